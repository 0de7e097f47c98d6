{{/*
The name of all that belongs to the release. It leaves room for "-redis" in the
63 characters of a DNS label; a release's name, of 53 at the most, always stays whole.
*/}}
{{- define "requestcount.name" -}}
{{- $name := .Release.Name -}}
{{- if not (contains .Chart.Name $name) -}}{{- $name = printf "%s-%s" $name .Chart.Name -}}{{- end -}}
{{- $name | trunc 57 | trimSuffix "-" -}}
{{- end }}

{{/* The labels that select a component's pods, and that no upgrade may change. Takes (list $ COMPONENT). */}}
{{- define "requestcount.selector" -}}
{{- $root := first . -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{/* The labels of an object. Takes (list $ COMPONENT). */}}
{{- define "requestcount.labels" -}}
{{- $root := first . -}}
{{ include "requestcount.selector" . }}
app.kubernetes.io/part-of: {{ $root.Chart.Name }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- if eq (last .) "server" }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
{{- end }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- end }}

{{/* What every pod has: the restricted Pod Security Standard, and the user's choice of nodes. */}}
{{- define "requestcount.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
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

{{/* What every container has. */}}
{{- define "requestcount.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* The key of the total in Redis. */}}
{{- define "requestcount.key" -}}
{{- .Values.redis.key | default (include "requestcount.name" .) -}}
{{- end }}
