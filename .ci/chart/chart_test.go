// Package chart checks what the Helm chart renders, against the types of
// Kubernetes itself. It is a module of its own, so that nothing of Kubernetes
// enters the project's go.mod. The program at $HELM, or helm, renders.
package chart

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

const chart = "../../helm"

// version is that of the types that this module checks against; a Helm built
// from source takes the cluster for a much older one.
const version = "--kube-version=1.34"

// helm runs Helm and returns what it prints on stdout, or its failure with what it says on stderr.
func helm(args ...string) (string, error) {
	name := os.Getenv("HELM")
	if name == "" {
		name = "helm"
	}
	var stderr strings.Builder
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, &stderr)
	}
	return string(out), nil
}

// A release is all that the chart renders.
type release struct {
	order       []string // "Kind/name", sorted
	deployments map[string]appsv1.Deployment
	services    map[string]corev1.Service
	user        *int64 // that the pods ask for
}

// decode decodes a document as the API server does: YAML to untyped JSON, and
// that strictly. A number in place of a string, an unknown or a doubled field is an error.
func decode(doc string, into any) error {
	data, err := yaml.YAMLToJSONStrict([]byte(doc))
	if err != nil {
		return err
	}
	strict, err := json.UnmarshalStrict(data, into)
	return errors.Join(append(strict, err)...)
}

// render renders a release with the arguments of helm template, and decodes
// each document into its type of Kubernetes; an unexpected kind fails the test.
func render(t *testing.T, name string, args ...string) release {
	t.Helper()
	lint := slices.DeleteFunc(slices.Clone(args), func(arg string) bool { return strings.HasPrefix(arg, "--api-versions") }) // only template knows it
	if out, err := helm(append([]string{"lint", "--strict", chart, version}, lint...)...); err != nil {
		t.Fatalf("helm lint: %v\n%s", err, out)
	}
	out, err := helm(append([]string{"template", name, chart, version}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	r := release{deployments: map[string]appsv1.Deployment{}, services: map[string]corev1.Service{}}
	if user := int64(65532); !slices.ContainsFunc(args, func(arg string) bool { return strings.Contains(arg, "openshift") || strings.Contains(arg, "runAsUser") }) {
		r.user = &user
	}
	for _, doc := range strings.Split("\n"+out, "\n---\n")[1:] {
		var typ metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(doc), &typ); err != nil {
			t.Fatal(err)
		}
		var meta metav1.ObjectMeta
		switch typ.APIVersion + " " + typ.Kind {
		case "apps/v1 Deployment":
			var d appsv1.Deployment
			err = decode(doc, &d)
			meta = d.ObjectMeta
			r.deployments[meta.Name] = d
		case "v1 Service":
			var s corev1.Service
			err = decode(doc, &s)
			meta = s.ObjectMeta
			r.services[meta.Name] = s
		default:
			t.Fatalf("the chart has a %s %s:\n%s", typ.APIVersion, typ.Kind, doc)
		}
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", typ.Kind, meta.Name, err, doc)
		}
		if meta.Namespace != "" {
			t.Errorf("%s %s names its namespace", typ.Kind, meta.Name)
		}
		r.order = append(r.order, typ.Kind+"/"+meta.Name)
		chartName := "requestcount"
		if slices.Contains(args, "nameOverride=counter") {
			chartName = "counter"
		}
		checkLabels(t, typ.Kind+"/"+meta.Name, name, chartName, meta.Labels)
	}
	slices.Sort(r.order)
	for _, d := range r.deployments {
		checkDeployment(t, r, d)
	}
	return r
}

func checkLabels(t *testing.T, what, release, name string, labels map[string]string) {
	t.Helper()
	want := map[string]string{"name": name, "instance": release, "part-of": name, "managed-by": "Helm", "component": "server"}
	if strings.HasSuffix(what, "-redis") {
		want["component"] = "redis"
	}
	for name, value := range want {
		if got := labels["app.kubernetes.io/"+name]; got != value {
			t.Errorf("%s: label %s is %q, want %q", what, name, got, value)
		}
	}
	for name, value := range labels {
		if len(value) > 63 {
			t.Errorf("%s: label %s has more than 63 characters: %s", what, name, value)
		}
	}
}

// checkDeployment checks what every Deployment has, whatever the values.
func checkDeployment(t *testing.T, r release, d appsv1.Deployment) {
	t.Helper()
	s, ok := r.services[d.Name]
	if !ok {
		t.Fatalf("%s has no Service", d.Name)
	}
	pod := d.Spec.Template.Spec
	if len(d.Name) > 63 || len(pod.Containers) != 1 || len(pod.InitContainers) != 0 {
		t.Fatalf("%s: %d characters, %d containers, %d others", d.Name, len(d.Name), len(pod.Containers), len(pod.InitContainers))
	}
	selector := d.Spec.Selector.MatchLabels
	if len(selector) != 3 || len(d.Spec.Selector.MatchExpressions) != 0 || !maps.Equal(selector, s.Spec.Selector) {
		t.Errorf("%s: the Deployment selects %v, the Service %v", d.Name, selector, s.Spec.Selector)
	}
	for name, value := range selector {
		if got := d.Spec.Template.Labels[name]; got != value {
			t.Errorf("%s: its pods have %s=%q, the selector %q", d.Name, name, got, value)
		}
	}
	c := pod.Containers[0]
	if len(c.Ports) != 1 || len(s.Spec.Ports) != 1 || s.Spec.Ports[0].TargetPort.StrVal != c.Ports[0].Name {
		t.Errorf("%s: ports %+v behind %+v", d.Name, c.Ports, s.Spec.Ports)
	}
	if c.LivenessProbe == nil || c.ReadinessProbe == nil {
		t.Fatalf("%s lacks a probe", d.Name)
	}

	// The restricted Pod Security Standard, and what the project adds to it.
	no, yes := false, true
	wantPod := &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: r.user, RunAsGroup: r.user,
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}}
	if !reflect.DeepEqual(pod.SecurityContext, wantPod) {
		t.Errorf("%s: the pod's security context is %v", d.Name, pod.SecurityContext)
	}
	wantContainer := &corev1.SecurityContext{AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
		Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}}
	if !reflect.DeepEqual(c.SecurityContext, wantContainer) {
		t.Errorf("%s: the container's security context is %v", d.Name, c.SecurityContext)
	}
	for what, got := range map[string]*bool{"automountServiceAccountToken": pod.AutomountServiceAccountToken, "enableServiceLinks": pod.EnableServiceLinks} {
		if got == nil || *got {
			t.Errorf("%s: %s is not false", d.Name, what)
		}
	}
	if pod.HostNetwork || pod.HostPID || pod.HostIPC || pod.ServiceAccountName != "" || c.Ports[0].HostPort != 0 {
		t.Errorf("%s shares something with its node or has an account: %+v", d.Name, pod)
	}
	if c.Resources.Limits.Memory().IsZero() {
		t.Errorf("%s has no memory limit", d.Name)
	}
}

// server returns the instances' Deployment, its container and that container's plain environment.
func (r release) server(t *testing.T, name string) (appsv1.Deployment, corev1.Container, map[string]string) {
	t.Helper()
	d, ok := r.deployments[name]
	if !ok {
		t.Fatalf("no Deployment %s among %v", name, r.order)
	}
	env := map[string]string{}
	for _, e := range d.Spec.Template.Spec.Containers[0].Env {
		if _, twice := env[e.Name]; twice {
			t.Errorf("%s is set twice", e.Name)
		}
		env[e.Name] = e.Value
	}
	return d, d.Spec.Template.Spec.Containers[0], env
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

var all = []string{"Deployment/requestcount", "Deployment/requestcount-redis", "Service/requestcount", "Service/requestcount-redis"}

func TestDefaults(t *testing.T) {
	r := render(t, "requestcount")
	equal(t, "objects", r.order, all)
	d, c, env := r.server(t, "requestcount")
	equal(t, "replicas", *d.Spec.Replicas, int32(3))
	equal(t, "image", c.Image, "requestcount:1.0.0")
	equal(t, "environment", env, map[string]string{"REDIS_URL": "redis://requestcount-redis", "REDIS_KEY": "requestcount", "REDIS_TIMEOUT": "5s", "SHUTDOWN_DELAY": "5s"})
	equal(t, "maxUnavailable", d.Spec.Strategy.RollingUpdate.MaxUnavailable.String(), "0")
	equal(t, "grace period", *d.Spec.Template.Spec.TerminationGracePeriodSeconds, int64(5+25+6*5))
	equal(t, "liveness", c.LivenessProbe.HTTPGet.Path, "/healthz")
	equal(t, "readiness", c.ReadinessProbe.HTTPGet.Path, "/readyz")
	equal(t, "port", r.services["requestcount"].Spec.Ports[0].Port, int32(8083))

	redis := r.deployments["requestcount-redis"].Spec
	c = redis.Template.Spec.Containers[0]
	equal(t, "Redis' replicas", *redis.Replicas, int32(1))
	equal(t, "Redis' strategy", redis.Strategy.Type, appsv1.RecreateDeploymentStrategyType)
	equal(t, "Redis' image", c.Image, "docker.io/library/redis:8-alpine")
	equal(t, "Redis' user", strings.Join(c.Args, " "), "--user default on nopass resetkeys ~requestcount resetchannels"+
		" -@all +eval +evalsha +hmget +hset +hsetnx +hgetall +hget")
	for what, probe := range map[string]*corev1.Probe{"liveness": c.LivenessProbe, "readiness": c.ReadinessProbe} {
		equal(t, "Redis' "+what, probe.ProbeHandler, corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromString("redis")}})
	}
}

// What testdata/full.yaml sets has gone where it belongs.
func TestEveryValue(t *testing.T) {
	r := render(t, "blue", "--values", "testdata/full.yaml")
	equal(t, "objects", r.order, []string{"Deployment/blue-requestcount", "Deployment/blue-requestcount-redis", "Service/blue-requestcount", "Service/blue-requestcount-redis"})
	d, c, env := r.server(t, "blue-requestcount")
	pod := d.Spec.Template
	equal(t, "replicas", *d.Spec.Replicas, int32(7))
	equal(t, "image", c.Image, "registry.example/rc:5060547")
	equal(t, "environment", env, map[string]string{"REDIS_URL": "redis://blue-requestcount-redis", "REDIS_KEY": "counts", "REDIS_TIMEOUT": "2s", "SHUTDOWN_DELAY": "9s", "GOGC": "50", "POD": ""})
	equal(t, "grace period", *pod.Spec.TerminationGracePeriodSeconds, int64(9+25+6*2))
	equal(t, "memory limit", c.Resources.Limits.Memory().String(), "99Mi")
	equal(t, "annotation", pod.Annotations, map[string]string{"example.com/a": "1"})
	equal(t, "label", pod.Labels["example.com/tier"], "front")
	equal(t, "label that is common, too", pod.Labels["example.com/team"], "green")
	equal(t, "affinity", pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0].MatchExpressions[0].Key, "disk")
	equal(t, "volume", pod.Spec.Volumes[0].ConfigMap.Name, "ca")
	equal(t, "mount", c.VolumeMounts, []corev1.VolumeMount{{Name: "ca", MountPath: "/ca", ReadOnly: true}})
	s := r.services["blue-requestcount"]
	equal(t, "Service", s.Spec.Type, corev1.ServiceTypeNodePort)
	equal(t, "port", s.Spec.Ports[0].Port, int32(80))
	equal(t, "node port", s.Spec.Ports[0].NodePort, int32(30083))
	equal(t, "external traffic policy", s.Spec.ExternalTrafficPolicy, corev1.ServiceExternalTrafficPolicyLocal)
	equal(t, "IP families", *s.Spec.IPFamilyPolicy, corev1.IPFamilyPolicyPreferDualStack)
	equal(t, "Service's annotations", s.Annotations, map[string]string{"example.com/b": "2"})

	redis := r.deployments["blue-requestcount-redis"].Spec.Template.Spec
	equal(t, "Redis' image", redis.Containers[0].Image, "registry.example/redis:8")
	equal(t, "Redis' memory limit", redis.Containers[0].Resources.Limits.Memory().String(), "33Mi")
	equal(t, "Redis' key", redis.Containers[0].Args[5], "~counts")
	for name, pod := range map[string]corev1.PodSpec{"instances": pod.Spec, "Redis": redis} {
		equal(t, name+": pull secrets", pod.ImagePullSecrets, []corev1.LocalObjectReference{{Name: "registry"}})
		equal(t, name+": node selector", pod.NodeSelector, map[string]string{"kubernetes.io/arch": "amd64"})
		equal(t, name+": tolerations", pod.Tolerations, []corev1.Toleration{{Key: "dedicated", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule}})
	}

	// Each object has the common label: the pods of the instances by podLabels another value.
	labels := map[string]map[string]string{"Redis' pods": r.deployments["blue-requestcount-redis"].Spec.Template.Labels}
	for name, d := range r.deployments {
		labels["Deployment "+name] = d.Labels
	}
	for name, s := range r.services {
		labels["Service "+name] = s.Labels
	}
	for what, labels := range labels {
		equal(t, what+": common label", labels["example.com/team"], "blue")
	}

	// What the Deployments select, and their names, no upgrade may change.
	for name, before := range render(t, "blue").deployments {
		equal(t, name+": selector", r.deployments[name].Spec.Selector, before.Spec.Selector)
	}
}

func TestOutsideRedis(t *testing.T) {
	app := []string{"Deployment/requestcount", "Service/requestcount"}
	r := render(t, "requestcount", "--set", "redis.enabled=false,redis.existingSecret=mine,redis.existingSecretKey=redis-url")
	equal(t, "objects", r.order, app)
	_, c, _ := r.server(t, "requestcount")
	equal(t, "URL", c.Env[0], corev1.EnvVar{Name: "REDIS_URL", ValueFrom: &corev1.EnvVarSource{
		SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "mine"}, Key: "redis-url"}}})

	// Kubernetes expands $(NAME) only where NAME comes before.
	const url = "rediss://:$(REDIS_PASSWORD)@redis.example/3"
	r = render(t, "requestcount", "--set", "redis.enabled=false,redis.url="+url+",extraEnv[0].name=REDIS_PASSWORD,extraEnv[0].value=p%40ss")
	equal(t, "objects", r.order, app)
	_, c, _ = r.server(t, "requestcount")
	equal(t, "environment", c.Env[:2], []corev1.EnvVar{{Name: "REDIS_PASSWORD", Value: "p%40ss"}, {Name: "REDIS_URL", Value: url}})
}

// The number of instances is left to others.
func TestNoReplicaCount(t *testing.T) {
	for _, others := range []string{"replicaCount=null", "replicaCount="} {
		d, _, _ := render(t, "requestcount", "--set", others).server(t, "requestcount")
		equal(t, others, d.Spec.Replicas, (*int32)(nil))
	}
}

// The number of instances may be a string, as a tool may write it.
func TestReplicaCountInQuotes(t *testing.T) {
	d, _, _ := render(t, "requestcount", "--set-string", "replicaCount=5").server(t, "requestcount")
	equal(t, "replicas", *d.Spec.Replicas, int32(5))
}

// null takes a map or a list away, also one that has no default.
func TestNull(t *testing.T) {
	for _, value := range []string{"podLabels", "commonLabels", "podAnnotations", "extraEnv", "service.annotations", "nodeSelector", "affinity", "redis.url", "redis.key"} {
		equal(t, value, render(t, "requestcount", "--set", value+"=null").order, all)
	}
}

// OpenShift gives pods a user, by itself or as the chart's page says.
func TestOpenShift(t *testing.T) {
	render(t, "requestcount", "--api-versions=security.openshift.io/v1")
	render(t, "requestcount", "--set", "podSecurityContext.runAsUser=null,podSecurityContext.runAsGroup=null")
}

// A subchart is given "global" by its parent, which may have a condition for it.
func TestSubchart(t *testing.T) {
	equal(t, "objects", render(t, "requestcount", "--set", "global.region=eu,enabled=true").order, all)
}

// Each type of Service has only the fields that the API server lets it have, so
// that a type can be changed while the values for another one stay.
func TestServiceTypes(t *testing.T) {
	const all = ",service.nodePort=30083,service.externalTrafficPolicy=Local,service.loadBalancerClass=example.com/1,service.loadBalancerSourceRanges={10.0.0.0/8}"
	class := "example.com/1"
	for typ, want := range map[corev1.ServiceType]corev1.ServiceSpec{
		"ClusterIP":    {},
		"NodePort":     {ExternalTrafficPolicy: "Local"},
		"LoadBalancer": {ExternalTrafficPolicy: "Local", LoadBalancerClass: &class, LoadBalancerSourceRanges: []string{"10.0.0.0/8"}},
	} {
		got := render(t, "requestcount", "--set", "service.type="+string(typ)+all).services["requestcount"].Spec
		want.Type, want.Selector, want.Ports = typ, got.Selector, slices.Clone(got.Ports)
		want.Ports[0].NodePort = 30083
		if typ == "ClusterIP" {
			want.Ports[0].NodePort = 0
		}
		equal(t, string(typ), got, want)
	}
}

func TestImages(t *testing.T) {
	digest := "8-alpine@sha256:" + strings.Repeat("0a", 32)
	r := render(t, "requestcount", "--set", "image.tag="+digest+",redis.image.tag="+digest)
	equal(t, "image", r.deployments["requestcount"].Spec.Template.Spec.Containers[0].Image, "requestcount:"+digest)
	equal(t, "Redis' image", r.deployments["requestcount-redis"].Spec.Template.Spec.Containers[0].Image, "docker.io/library/redis:"+digest)
}

// What YAML takes for a number or for true is a string where the API wants one.
func TestStrings(t *testing.T) {
	for _, name := range []string{"2026", "on", "1e3"} {
		equal(t, name, render(t, name, "--set", "fullnameOverride=on").order[0], "Deployment/on")
		_, c, _ := render(t, "requestcount", "--set", "redis.enabled=false", "--set-string", "redis.existingSecret="+name+",redis.existingSecretKey="+name).server(t, "requestcount")
		equal(t, name+" as a Secret's name and key", *c.Env[0].ValueFrom.SecretKeyRef, corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: name}, Key: name})
	}
}

// The URLs that the chart takes are those that the program takes.
func TestURLs(t *testing.T) {
	for _, scheme := range []string{"redis", "rediss", "valkey", "valkeys"} {
		_, _, env := render(t, "requestcount", "--set", "redis.enabled=false,redis.url="+scheme+"://h").server(t, "requestcount")
		equal(t, "URL", env["REDIS_URL"], scheme+"://h")
	}
}

// Each YAML file on the chart's page is one of values that the chart takes, or
// objects that the API server takes.
func TestPage(t *testing.T) {
	page, err := os.ReadFile(chart + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	values, policies := 0, 0
	for _, block := range strings.Split(string(page), "```yaml\n")[1:] {
		block, _, _ = strings.Cut(block, "```")
		if !strings.Contains(block, "kind:") {
			file := filepath.Join(t.TempDir(), "values.yaml")
			if err := os.WriteFile(file, []byte(block), 0o600); err != nil {
				t.Fatal(err)
			}
			render(t, "requestcount", "--values", file)
			values++
			continue
		}
		for _, doc := range strings.Split(block, "\n---\n") {
			var policy networkingv1.NetworkPolicy
			if err := decode(doc, &policy); err != nil || policy.Kind != "NetworkPolicy" {
				t.Errorf("%v in\n%s", err, doc)
			}
			pods := render(t, "requestcount").deployments[policy.Name].Spec.Template.Labels
			for name, value := range policy.Spec.PodSelector.MatchLabels {
				equal(t, policy.Name+" selects "+name, value, pods[name])
			}
			policies++
		}
	}
	equal(t, "files of values and policies", []int{values, policies}, []int{2, 2})
}

func TestNames(t *testing.T) {
	long := strings.Repeat("x", 53)
	for _, tt := range []struct{ release, set, want string }{
		{"blue", "", "blue-requestcount"},
		{"my-requestcount", "", "my-requestcount"},
		{long, "", long + "-req"},
		{"blue", "nameOverride=counter", "blue-counter"},
		{"2026-demo", "fullnameOverride=demo", "demo"},
		{"v1.0", "fullnameOverride=demo", "demo"},
	} {
		equal(t, tt.release+" "+tt.set, render(t, tt.release, "--set", tt.set).order[0], "Deployment/"+tt.want)
	}
}

// Two releases in a namespace share no name and no key in Redis, also where
// their names, of 53 characters at the most, differ in the last only.
func TestTwoReleases(t *testing.T) {
	long := strings.Repeat("x", 52)
	for _, pair := range [][2]string{{"blue", "green"}, {long + "a", long + "b"}} {
		one, two := render(t, pair[0]), render(t, pair[1])
		for _, object := range one.order {
			if slices.Contains(two.order, object) {
				t.Errorf("%v share %s", pair, object)
			}
		}
		keys := map[string]bool{}
		for _, r := range []release{one, two} {
			for _, d := range r.deployments {
				for _, e := range d.Spec.Template.Spec.Containers[0].Env {
					if strings.HasPrefix(e.Name, "REDIS_") && e.Name != "REDIS_TIMEOUT" && keys[e.Value] {
						t.Errorf("%v share %s=%s", pair, e.Name, e.Value)
					}
					keys[e.Value] = true
				}
			}
		}
	}
}

// Wrong values are refused with a sentence that names them.
func TestRefusals(t *testing.T) {
	for _, tt := range []struct{ release, set, says string }{
		{"requestcount", "redis.enabled=false", "redis.enabled is false: set redis.url"},
		{"requestcount", "redis.enabled=false,redis.url=redis://a,redis.existingSecret=b", "redis.url and redis.existingSecret are both set"},
		{"requestcount", "redis.url=redis://a", "set redis.enabled=false"},
		{"requestcount", "redis.existingSecret=b", "set redis.enabled=false"},
		{"requestcount", "redis.enabled=false,redis.url=http://a", "/redis/url"},
		{"requestcount", "redis.key=a{b}", "/redis/key"},
		{"requestcount", "replicas=5", "'replicas'"},
		{"requestcount", "replicaCount=many", "/replicaCount"},
		{"requestcount", "image.name=x", "'name'"},
		{"requestcount", "image.tag=a b", "/image/tag"},
		{"requestcount", "image.tag=true", "/image/tag"},
		{"requestcount", "image.tag=null", "'tag'"},
		{"requestcount", "redis.image.pullPolicy=null", "'pullPolicy'"},
		{"requestcount", "image=null", "'image'"},
		{"requestcount", "shutdownDelaySeconds=null", "'shutdownDelaySeconds'"},
		{"requestcount", "service.type=null", "'type'"},
		{"requestcount", "redis.image.tag=8@sha256:0", "/redis/image"},
		{"requestcount", "replicaCount=08", "/replicaCount"},
		{"requestcount", "service.nodePort=0", "/service/nodePort"},
		{"requestcount", "service.ipFamilyPolicy=Dual", "/service/ipFamilyPolicy"},
		{"requestcount", "extraEnv[0].name=GOGC,extraEnv[0].value=50", "/extraEnv/0/value"},
		{"requestcount", `commonLabels.helm\.sh/chart=x`, "/commonLabels"},
		{"requestcount", "service.type=ExternalName", "/service/type"},
		{"requestcount", "redisTimeoutSeconds=0", "/redisTimeoutSeconds"},
		{"requestcount", "shutdownDelaySeconds=5s", "/shutdownDelaySeconds"},
		{"requestcount", "podAnnotations.a=1", "/podAnnotations/a"},
		{"requestcount", `podLabels.app\.kubernetes\.io/name=x`, "/podLabels"},
		{"requestcount", "extraEnv[0].name=REDIS_URL", "extraEnv has REDIS_URL"},
		{"2026-demo", "", `"2026-demo-requestcount" cannot name a Service`},
		{"v1.0", "", `"v1.0-requestcount" cannot name a Service`},
		{"requestcount", "fullnameOverride=Big", `"Big" cannot name a Service`},
	} {
		_, err := helm("template", tt.release, chart, version, "--set", tt.set)
		if err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s --set %s: %v, want %s", tt.release, tt.set, err, tt.says)
		}
	}
}
