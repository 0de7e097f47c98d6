package faults

import (
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A Redis that does not let the instance in: it says why, without the
// password, answers 503, and counts.
func TestRefusedByRedis(t *testing.T) {
	needRedis(t)
	port, file := freePort(), certificate(t)
	s := startTLS(t, port, file)
	for _, tt := range []struct{ name, url, certificates, says string }{
		{name: "wrong password", url: "redis://:secret@" + s.addr(), says: "WRONGPASS"},
		{name: "no password", url: "redis://" + s.addr(), says: "NOAUTH"},
		{name: "a command that its ACL refuses",
			url: "redis://:" + password + "@" + s.addr() + "/1", says: "NOPERM"},
		{name: "nobody listens", url: "redis://:secret@127.0.0.1:" + freePort(),
			says: "connection refused"},
		{name: "a certificate of nobody known", url: "rediss://:secret@127.0.0.1:" + port,
			says: "certificate signed by unknown authority"},
		{name: "a certificate for another name", url: "rediss://:secret@localhost:" + port,
			certificates: file,
			says:         "certificate is not valid for any names, but wanted to match localhost"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, "REDIS_URL="+tt.url, "SSL_CERT_FILE="+tt.certificates)
			for n := range int64(3) {
				a, err := ask(http.DefaultClient, p.url)
				if err != nil || a.Status != http.StatusServiceUnavailable || a.N != n+1 {
					t.Errorf("request %d: got %+v, %v, want a 503", n+1, a, err)
				}
			}
			status, body := get(t, p.url+"/readyz")
			if status != http.StatusServiceUnavailable || !strings.Contains(body, tt.says) {
				t.Errorf("/readyz: got %d %q, want a 503 that says %q", status, body, tt.says)
			}
			p.kill()
			log := p.stderr.String()
			got := p.lines("cannot count in Redis")
			if got != 1 || !strings.Contains(log, tt.says) {
				t.Errorf("lines that it cannot count in Redis: got %d, want 1 with %q, in:\n%s",
					got, tt.says, log)
			}
			if strings.Contains(log, "secret") {
				t.Errorf("the log has the password:\n%s", log)
			}
		})
	}
}

// An instance that Redis refuses for good tries twice a second, and goes on
// trying as it ends, for 10 s. Then it says that Redis lacks something.
func TestRefusedForGood(t *testing.T) {
	needRedis(t)
	t.Parallel()
	s := startServer(t)
	p := startProcess(t, "REDIS_URL=redis://:wrong@"+s.addr(), "REDIS_TIMEOUT=100ms")
	time.Sleep(time.Second) // after which it knows that Redis is down
	const seconds = 3
	before := s.stat("total_connections_received")
	time.Sleep(seconds * time.Second)
	if got := s.stat("total_connections_received") - before; got < seconds || got > 2*seconds+1 {
		t.Errorf("connections in %d s: got %d, want %d to %d", seconds, got, seconds, 2*seconds+1)
	}
	for range 3 {
		get(t, p.url)
	}
	began := time.Now()
	status, log := p.stop()
	if took := time.Since(began); status != 0 || took > 12*time.Second {
		t.Errorf("stopped: got status %d after %v, want 0 after 12 s at the most", status, took)
	}
	for _, want := range []string{
		`msg="waiting `,
		`msg="Redis may not know all that this instance has counted"`,
		"WRONGPASS",
		"msg=stop handled=3\n",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log: got no %q, want one, in:\n%s", want, log)
		}
	}
}

// A request that waits for a silent Redis when its instance is told to stop is answered, even if
// that takes longer than the 10 s for which the instance tries to tell Redis.
func TestAnsweredAsItEnds(t *testing.T) {
	needRedis(t)
	t.Parallel()
	s, url := startRedis(t)
	p := startProcess(t, url, "REDIS_TIMEOUT=7500ms")
	next(t, p, 1)
	s.cmd.Process.Signal(syscall.SIGSTOP)
	time.AfterFunc(time.Second, p.terminate)
	a, err := ask(http.DefaultClient, p.url)
	if took := a.end - a.start; err != nil || a.Status != http.StatusServiceUnavailable || took < 11*time.Second {
		t.Errorf("got %+v, %v after %v, want a 503 after 11 s", a, err, took)
	}
	if status, log := p.stop(); status != 0 || !strings.Contains(log, "msg=stop handled=2\n") {
		t.Errorf("stopped: got status %d, want 0, in:\n%s", status, log)
	}
}
