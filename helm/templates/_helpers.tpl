{{/* The chart's name, as labels have it. */}}
{{- define "requestcount.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/*
The name of all that belongs to the release. It leaves room for "-redis" in the
63 characters of a DNS label; a release's name, of 53 at the most, always stays whole.
*/}}
{{- define "requestcount.fullname" -}}
{{- $name := include "requestcount.name" . -}}
{{- $fullname := .Release.Name -}}
{{- if not (contains $name $fullname) -}}{{- $fullname = printf "%s-%s" $fullname $name -}}{{- end -}}
{{- .Values.fullnameOverride | default $fullname | trunc 57 | trimSuffix "-" -}}
{{- end }}

{{/* What the schema cannot say: it fails with one line, before anything is installed. */}}
{{- define "requestcount.validate" -}}
{{- $fullname := include "requestcount.fullname" . -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $fullname) -}}
  {{- fail (printf "%q cannot name a Service, which begins with a letter and has lower-case letters, digits and \"-\" only: choose another release name, or set fullnameOverride" $fullname) -}}
{{- end -}}
{{- with .Values.redis -}}
  {{- if and .enabled (or .url .existingSecret) -}}
    {{- fail "redis.url and redis.existingSecret are for an outside Redis: set redis.enabled=false with them" -}}
  {{- else if and (not .enabled) (not .url) (not .existingSecret) -}}
    {{- fail "redis.enabled is false: set redis.url to the URL of an outside Redis, or redis.existingSecret to the name of a Secret that holds it" -}}
  {{- else if and .url .existingSecret -}}
    {{- fail "redis.url and redis.existingSecret are both set: set one of them" -}}
  {{- end -}}
{{- end -}}
{{- range .Values.extraEnv -}}
  {{- if has .name (list "ADDR" "REDIS_URL" "REDIS_KEY" "REDIS_TIMEOUT" "SHUTDOWN_DELAY") -}}
    {{- fail (printf "extraEnv has %s, which the chart sets itself: use redis, redisTimeoutSeconds, shutdownDelaySeconds and service.port" .name) -}}
  {{- end -}}
{{- end -}}
{{- end }}

{{/* The labels that select a component's pods, and that no upgrade may change. Takes (list $ COMPONENT). */}}
{{- define "requestcount.selectorLabels" -}}
{{- $root := first . -}}
app.kubernetes.io/name: {{ include "requestcount.name" $root | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{/* The labels of an object. Takes (list $ COMPONENT). */}}
{{- define "requestcount.labels" -}}
{{- $root := first . -}}
{{ include "requestcount.selectorLabels" . }}
app.kubernetes.io/part-of: {{ include "requestcount.name" $root | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- if eq (last .) "server" }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
{{- end }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/*
The number of instances. Where that is left to others, by null or "", it is the
present one: to leave the field out would not do, as an upgrade from a release
that had it removes it, and that makes it 1.
*/}}
{{- define "requestcount.replicas" -}}
{{- if not (has .Values.replicaCount (list nil "")) -}}
  {{- .Values.replicaCount -}}
{{- else -}}
  {{- lookup "apps/v1" "Deployment" .Release.Namespace (include "requestcount.fullname" .) | dig "spec" "replicas" "" -}}
{{- end -}}
{{- end }}

{{/* What every pod has. OpenShift gives each namespace users of its own and refuses the default one. */}}
{{- define "requestcount.podSpec" -}}
{{- $context := .Values.podSecurityContext | default dict -}}
{{- if .Capabilities.APIVersions.Has "security.openshift.io/v1" -}}
  {{- range $field := list "runAsUser" "runAsGroup" -}}
    {{- if eq (int64 (get $context $field)) 65532 -}}{{- $context = omit $context $field -}}{{- end -}}
  {{- end -}}
{{- end -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $context }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The image. YAML may have read its tag as a number. Takes (list IMAGE DEFAULT-TAG). */}}
{{- define "requestcount.image" -}}
{{- $image := first . -}}
{{- $tag := $image.tag -}}
{{- if not (kindIs "string" $tag) -}}{{- $tag = int64 $tag | toString -}}{{- end -}}
{{- printf "%s:%s" $image.repository ($tag | default (last .)) -}}
{{- end }}

{{/* The key of the ledger in Redis. */}}
{{- define "requestcount.key" -}}
{{- .Values.redis.key | default (include "requestcount.fullname" .) -}}
{{- end }}
