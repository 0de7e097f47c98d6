package chart

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// make helm loads the image into the cluster of kubectl's context, and stops where it cannot.
func TestMakeHelm(t *testing.T) {
	bin := t.TempDir()
	const program = `#!/bin/sh
case "${0##*/} $1" in
"kubectl config") echo "$CONTEXT" ;;
"docker image") echo sha256:1 ;;
*) echo "${0##*/} $*" >>"$SAID" ;;
esac
`
	for _, name := range []string{"docker", "helm", "k3d", "kind", "kubectl", "minikube"} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte(program), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for context, load := range map[string]string{
		"docker-desktop": "",
		"kind-kind":      "kind load docker-image --name kind requestcount:1.0.0\n",
		"k3d-my-own":     "k3d image import --cluster my-own requestcount:1.0.0\n",
		"minikube":       "minikube image load requestcount:1.0.0\n",
		"gke_mine":       "make helm is for a local cluster, and gke_mine is none",
		"":               "make helm is for a local cluster",
	} {
		said := filepath.Join(t.TempDir(), "said")
		cmd := exec.Command("make", "-s", "-C", "../..", "helm")
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "CONTEXT="+context, "SAID="+said)
		out, err := cmd.CombinedOutput()
		ran, _ := os.ReadFile(said)
		if strings.HasPrefix(load, "make") {
			if err == nil || !strings.Contains(string(out), load) || strings.Contains(string(ran), "helm") {
				t.Errorf("with the context %q make helm ends with %v and says %s; it runs\n%s", context, err, out, ran)
			}
			continue
		}
		build, install, _ := strings.Cut(string(ran), load+"helm upgrade --install requestcount ./helm ")
		if err != nil || !strings.HasPrefix(build, "docker build ") || strings.Count(build, "\n") != 1 ||
			!strings.Contains(install, "--set-string podAnnotations.image=sha256:1\nkubectl rollout status deployment/requestcount") {
			t.Errorf("with the context %q make helm ends with %v and says %s; it runs\n%s", context, err, out, ran)
		}
	}
}

// make help lists every target.
func TestMakeHelp(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	_, targets, _ := strings.Cut(string(makefile), "\n.PHONY: ")
	targets, _, _ = strings.Cut(targets, "\n")
	out, err := exec.Command("make", "-s", "-C", "../..", "help").Output()
	var listed []string
	for line := range strings.Lines(string(out)) {
		name, what, _ := strings.Cut(line, " ")
		if strings.TrimSpace(what) != "" {
			listed = append(listed, name)
		}
	}
	if got := strings.Join(listed, " "); err != nil || got != targets {
		t.Errorf("make help ends with %v and lists %q, want %q", err, got, targets)
	}
}
