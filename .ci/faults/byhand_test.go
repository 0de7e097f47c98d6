package faults

import (
	"bufio"
	"cmp"
	"fmt"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Redis loses its data just after an instance was asked, which maybe ends then. Another one, which
// maybe starts just then, goes on with the next number.
func TestNextNumber(t *testing.T) {
	flush := func(t *testing.T, s *server, path *proxy, asked *process) { s.do("FLUSHALL") }
	restart := func(t *testing.T, s *server, path *proxy, asked *process) { s.restart(0) }
	for _, tt := range []struct {
		name   string
		starts bool
		within time.Duration                                              // 2.5 s unless set
		lose   func(t *testing.T, s *server, path *proxy, asked *process) // path is to s, from asked
	}{
		{name: "FLUSHALL", lose: flush},
		{name: "FLUSHALL as the other starts", lose: flush, starts: true},
		{name: "Redis killed", lose: restart},
		{name: "Redis killed as the other starts", lose: restart, starts: true},
		{name: "FLUSHALL while the path from the instance is silent for 0.9 s",
			within: 3500 * time.Millisecond, lose: func(t *testing.T, s *server, path *proxy, asked *process) {
				path.set(vanish)
				s.do("FLUSHALL")
				time.AfterFunc(900*time.Millisecond, func() { path.set(none) })
			}},
		{name: "the instance and Redis killed",
			lose: func(t *testing.T, s *server, path *proxy, asked *process) {
				time.Sleep(300 * time.Millisecond)
				asked.kill()
				s.restart(0)
			}},
		{name: "the instance stopped and Redis killed",
			lose: func(t *testing.T, s *server, path *proxy, asked *process) {
				if status, log := asked.stop(); status != 0 || !strings.Contains(log, `msg="waiting `) {
					t.Errorf("stopped: got status %d, want 0 after a line that it waits, in:\n%s",
						status, log)
				}
				s.restart(0)
			}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, url := startRedis(t)
			path := newProxy(t, s.addr())
			viaPath := strings.Replace(url, s.addr(), path.Addr().String(), 1)
			asked, other := startProcess(t, viaPath), startProcess(t, url)
			next(t, other, 1)
			for n := int64(2); n < 8; n += 2 {
				if !asked.runs() {
					asked = startProcess(t, viaPath)
				}
				next(t, asked, n)
				tt.lose(t, s, path, asked)
				lost := time.Now()
				if tt.starts {
					other = startProcess(t, url)
				}
				next(t, other, n+1)
				took, within := time.Since(lost), cmp.Or(tt.within, 2500*time.Millisecond)
				if took > within {
					t.Errorf("the next number came after %v, want %v at the most", took, within)
				}
			}
		})
	}
}

// Many idle instances cost Redis little and write nothing. After a loss the number continues.
func TestManyInstances(t *testing.T) {
	t.Parallel()
	const instances = 30
	s, url := startRedis(t)
	var all [instances]*process
	for i := range all {
		all[i] = startProcess(t, url, "REDIS_TIMEOUT=5s")
	}
	for i, p := range all {
		next(t, p, int64(i+1))
	}
	time.Sleep(learned)
	began, before := time.Now(), s.stat("cmdstat_evalsha:calls=")
	changes := s.stat("rdb_changes_since_last_save:")
	time.Sleep(2 * time.Second)
	looks := float64(s.stat("cmdstat_evalsha:calls=") - before)
	if got, most := looks/time.Since(began).Seconds(), 4.0*instances; got > most {
		t.Errorf("looks a second: got %.0f, want up to %.0f", got, most)
	}
	if got := s.stat("rdb_changes_since_last_save:") - changes; got != 0 {
		t.Errorf("changes of idle instances: got %d, want 0", got)
	}
	if got, most := s.stat("connected_clients:"), 2*instances+5; got > most {
		t.Errorf("connections of %d instances: got %d, want up to %d", instances, got, most)
	}
	s.do("FLUSHALL")
	for i, p := range all {
		next(t, p, int64(instances+i+1))
	}
}

// logPipe starts an instance that logs to a pipe, and returns it and both ends of that.
func logPipe(t *testing.T, env ...string) (p *process, r, w *os.File) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return startProcessAt(t, "127.0.0.1:"+freePort(), w, env...), r, w
}

// An instance whose log has lost its reader, as `2>&1 | head -1` leaves it, goes on, and tells
// Redis all as it stops.
func TestLogWithoutReader(t *testing.T) {
	t.Parallel()
	s, url := startRedis(t)
	p, r, w := logPipe(t, url, "REDIS_TIMEOUT=100ms")
	w.Close()
	if line, err := bufio.NewReader(r).ReadString('\n'); !strings.Contains(line, "msg=start") {
		t.Errorf("the first line: got %q, %v, want one of the start", line, err)
	}
	r.Close()
	next(t, p, 1)
	s.kill()
	if a, err := ask(client, p.url); err != nil || a.Status != http.StatusServiceUnavailable {
		t.Errorf("without Redis: got %+v, %v, want a 503", a, err)
	}
	p.terminate()
	s.start()
	if status, _ := p.stop(); status != 0 {
		t.Errorf("stopped: got %v, want status 0", p.ProcessState)
	}
	if got := s.do("HGET requestcount total"); got != "2" {
		t.Errorf("the total at the end: got %s, want 2", got)
	}
}

// An instance whose log goes to a terminal that stands still answers, while Redis goes and comes.
func TestLogStandsStill(t *testing.T) {
	t.Parallel()
	s, url := startRedis(t)
	p, _, w := logPipe(t, url, "REDIS_TIMEOUT=100ms")
	next(t, p, 1)
	fill, err := os.OpenFile(fmt.Sprint("/proc/self/fd/", w.Fd()), os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("skipped: no way to fill a pipe here: %v", err)
	}
	defer fill.Close()
	fill.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := fill.Write(make([]byte, 16<<20)); err == nil {
		t.Fatalf("the pipe took %d bytes, want it full", n)
	}
	answers := func(when string) {
		for path, text := range map[string]string{"/": "You", "/readyz": "ready", "/metrics": "#"} {
			if err := p.says(path, text); err != nil {
				t.Errorf("%s: %v", when, err)
			}
		}
	}
	answers("with Redis")
	s.kill()
	eventually(t, func() error {
		answers("as Redis goes down") // whoever finds that, the keeper or a request
		if _, body := get(t, p.url+"/metrics"); !strings.Contains(body, "\nrequestcount_redis_up 0") {
			return fmt.Errorf("/metrics without Redis: got\n%s", body)
		}
		return nil
	})
	answers("without Redis")
	s.start()
	time.Sleep(learned)
	answers("with Redis again")
}

// A request that waits for a silent Redis when its instance is told to stop is answered, even if
// that takes longer than the 10 s for which the instance tries to tell Redis. These begin then: what
// it has counted is not lost.
func TestAnsweredAsItEnds(t *testing.T) {
	t.Parallel()
	s, url := startRedis(t)
	between := newProxy(t, s.addr())
	proxied := strings.Replace(url, s.addr(), between.Addr().String(), 1)
	p, other := startProcess(t, proxied, "REDIS_TIMEOUT=11s"), startProcess(t, url)
	next(t, p, 1)
	between.set(vanish)
	time.AfterFunc(time.Second, p.terminate)
	a, err := ask(client, p.url)
	if took := a.end - a.start; err != nil || a.Status != http.StatusServiceUnavailable || took < 11*time.Second {
		t.Errorf("got %+v, %v after %v, want a 503 after 11 s", a, err, took)
	}
	between.set(hold) // its next command arrives late
	between.setOpen(refuse)
	time.Sleep(2 * time.Second)
	between.set(none)
	if status, log := p.stop(); status != 0 || !strings.HasSuffix(log, "msg=stop handled=2\n") {
		t.Errorf("stopped: got status %d, want 0, in:\n%s", status, log)
	}
	s.do("FLUSHALL")
	next(t, other, 3)
}
