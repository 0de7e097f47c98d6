package faults

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// next fails the test unless the next request to p is told that number of the cluster.
func next(t testing.TB, p *process, want int64) {
	t.Helper()
	a, err := ask(http.DefaultClient, p.url)
	if err != nil || a.Status != http.StatusOK || a.Total != want {
		t.Errorf("instance %s: got %+v, %v, want a 200 and %d", p.addr, a, err, want)
	}
}

// lines returns how often the instance, which has ended, logged the message.
func (p *process) lines(message string) int {
	return strings.Count(p.stderr.String(), fmt.Sprintf(" msg=%q ", message))
}

// startRedis starts a Redis, and returns the setting that has an instance use it.
func startRedis(t testing.TB) (*server, string) {
	s := startServer(t)
	return s, "REDIS_URL=redis://:" + password + "@" + s.addr()
}

// Whatever becomes of Redis and of instances, the next number is one higher.
func TestNumberContinues(t *testing.T) {
	needRedis(t)
	t.Parallel()
	s, url := startRedis(t)
	env := []string{url, "REDIS_TIMEOUT=5s"}
	var all [3]*process
	for i := range all {
		all[i] = startProcess(t, env...)
	}
	for i := range 60 {
		next(t, all[i%3], int64(i+1))
	}
	time.Sleep(learned)
	s.do("FLUSHALL")
	next(t, all[0], 61)

	time.Sleep(learned)
	all[1].kill()
	s.restart(0)
	next(t, all[0], 62)
	next(t, all[2], 63)

	status, log := all[2].stop() // it has just counted
	if status != 0 || !strings.Contains(log, `msg="waiting `) {
		t.Errorf("stopped: got status %d, want 0 after a line that it waits, in:\n%s", status, log)
	}
	s.do("FLUSHALL")
	next(t, all[0], 64)

	fresh := startProcess(t, env...)
	time.Sleep(learned)
	s.do("FLUSHALL")
	next(t, fresh, 65)

	forgot := 0
	for _, p := range []*process{all[0], all[2], fresh} {
		p.stop()
		forgot += p.lines("told Redis what it lacked")
	}
	if most := 4 * 3; forgot < 4 || forgot > most { // several may notice it at the same time
		t.Errorf("lines for four times that Redis forgot: got %d, want 4 to %d", forgot, most)
	}
}

// Something in the ledger that is no count does no harm. Without the total the
// number starts over, until Redis loses its data.
func TestChangedByHand(t *testing.T) {
	needRedis(t)
	t.Parallel()
	s, url := startRedis(t)
	p := startProcess(t, url, "REDIS_TIMEOUT=5s")
	for n := range int64(10) {
		next(t, p, n+1)
	}
	s.do("HSET " + ledger + " note hello")
	time.Sleep(learned)
	next(t, p, 11)
	s.do("DEL requestcount")
	next(t, p, 1)
	next(t, p, 2)
	time.Sleep(learned)
	s.do("FLUSHALL")
	next(t, p, 14)
}

// Many idle instances cost Redis little, and when it forgets the first of them
// that is asked has it know everything again.
func TestManyInstances(t *testing.T) {
	needRedis(t)
	t.Parallel()
	const instances, each = 30, 3
	s, url := startRedis(t)
	var all [instances]*process
	n := int64(0)
	for i := range all {
		all[i] = startProcess(t, url, "REDIS_TIMEOUT=5s")
	}
	for range each {
		for _, p := range all {
			n++
			next(t, p, n)
		}
	}
	time.Sleep(learned)
	began, before := time.Now(), s.stat("total_commands_processed")
	time.Sleep(2 * time.Second)
	commands := float64(s.stat("total_commands_processed") - before)
	if got, most := commands/time.Since(began).Seconds(), 4.0*instances; got > most {
		t.Errorf("commands a second: got %.0f, want up to %.0f", got, most)
	}
	if got, most := s.stat("connected_clients"), 2*instances+5; got > most {
		t.Errorf("connections of %d instances: got %d, want up to %d", instances, got, most)
	}
	s.do("FLUSHALL")
	for _, p := range all {
		n++
		next(t, p, n)
	}
}

// Whoever watches the log of an instance learns when it cannot count in Redis,
// for how long, and that Redis has forgotten.
func TestLog(t *testing.T) {
	needRedis(t)
	t.Parallel()
	s, url := startRedis(t)
	p := startProcess(t, url, "REDIS_TIMEOUT=500ms")
	for n := range int64(10) {
		next(t, p, n+1)
	}
	s.do("FLUSHALL")
	next(t, p, 11)
	s.suspend(2 * time.Second) // a sync fails
	eventually(t, func() error {
		if a, err := ask(http.DefaultClient, p.url); err != nil || a.Status != http.StatusOK {
			return fmt.Errorf("after Redis was silent: got %+v, %v, want a 200", a, err)
		}
		return nil
	})
	_, log := p.stop()
	for _, message := range []string{
		"told Redis what it lacked", "cannot count in Redis", "counting in Redis again",
	} {
		if got := p.lines(message); got < 1 || got > 4 {
			t.Errorf("lines that say %q: got %d, want 1 to 4", message, got)
		}
	}
	for _, want := range []string{" requests=10 ", " after=", " cause="} {
		if !strings.Contains(log, want) {
			t.Errorf("the log: got no %q, want one", want)
		}
	}
	if t.Failed() {
		t.Log(log)
	}
}

// An instance stops when it is told to, and says so.
func TestStop(t *testing.T) {
	needRedis(t)
	t.Parallel()
	_, url := startRedis(t)
	for _, tt := range []struct {
		name, url string
		requests  int
		wait      time.Duration   // before the first signal
		signals   []time.Duration // waits between the signals that follow
		within    time.Duration
		logs      string // at the end; empty for an instance that a signal ended at once
	}{
		{name: "idle", url: url, requests: 3, wait: 2 * learned,
			within: 500 * time.Millisecond, logs: "msg=stop handled=3\n"},
		{name: "never asked", url: url, wait: learned,
			within: 500 * time.Millisecond, logs: "msg=stop handled=0\n"},
		{name: "two signals, as GNU timeout sends", url: url, requests: 1,
			signals: []time.Duration{50 * time.Millisecond},
			within:  5 * time.Second, logs: "msg=stop handled=1\n"},
		{name: "a second signal a second later",
			url: "REDIS_URL=redis://127.0.0.1:" + freePort(), requests: 1,
			signals: []time.Duration{1500 * time.Millisecond}, within: 2500 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, tt.url, "REDIS_TIMEOUT=200ms")
			for range tt.requests {
				get(t, p.url)
			}
			time.Sleep(tt.wait)
			began := time.Now()
			p.terminate()
			for _, wait := range tt.signals {
				time.Sleep(wait)
				p.Process.Signal(syscall.SIGTERM)
			}
			status, log := p.stop()
			if took := time.Since(began); took > tt.within {
				t.Errorf("stopped after %v, want %v at the most:\n%s", took, tt.within, log)
			}
			if tt.logs == "" && status != -1 {
				t.Errorf("got status %d, want an end by the signal", status)
			} else if tt.logs != "" && (status != 0 || !strings.HasSuffix(log, tt.logs)) {
				t.Errorf("got status %d, want 0 and %q at the log's end:\n%s", status, tt.logs, log)
			}
		})
	}
}

// Metrics leave out what the instance does not know, and have the total as it
// is in Redis.
func TestMetrics(t *testing.T) {
	needRedis(t)
	t.Parallel()
	s, url := startRedis(t)
	for _, tt := range []struct {
		name, url string
		want      []string // after two requests
	}{
		{name: "with Redis", url: url,
			want: []string{"instance_requests_total 2", "cluster_requests 1002", "redis_up 1"}},
		{name: "without Redis", want: []string{"instance_requests_total 2", "cluster_requests 2"}},
		{name: "before Redis has answered", url: "REDIS_URL=redis://127.0.0.1:" + freePort(),
			want: []string{"instance_requests_total 2", "redis_up 0"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, tt.url, "REDIS_TIMEOUT=200ms")
			for range 2 {
				get(t, p.url)
			}
			if tt.url == url {
				s.do("SET requestcount 1002") // by somebody else
			}
			eventually(t, func() error {
				_, page := get(t, p.url+"/metrics")
				samples := regexp.MustCompile(`(?m)^requestcount_.*`).FindAllString(page, -1)
				got := strings.ReplaceAll(strings.Join(samples, ", "), "requestcount_", "")
				if want := strings.Join(tt.want, ", "); got != want {
					return fmt.Errorf("samples: got %s, want %s", got, want)
				}
				return nil
			})
		})
	}
}

func TestVersion(t *testing.T) {
	out, err := exec.Command(program, "-version").Output()
	got := strings.TrimSuffix(string(out), "\n")
	if err != nil || got == "" || os.Getenv("PROGRAM") == "" && got != version {
		t.Errorf("-version: got %q, %v, want %s, or another one of $PROGRAM", got, err, version)
	}
}
