package faults

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// A Redis that does not let the instance in, or refuses what it needs: the instance is not ready
// and says why, once and without the password. It answers 503, and counts.
func TestRefusedByRedis(t *testing.T) {
	s := startServer(t)
	for _, command := range []string{"hset", "hmget", "hgetall", "hsetnx"} {
		s.do("ACL SETUSER no-" + command + " on >secret " + acl + " -" + command)
	}
	without := func(command string) string { return "redis://no-" + command + ":secret@" + s.addr() }
	for _, tt := range []struct{ name, url, says string }{
		{name: "wrong password", url: "redis://:secret@" + s.addr(), says: "WRONGPASS"},
		{name: "no password", url: "redis://" + s.addr(), says: "NOAUTH"},
		{name: "a command that its ACL refuses",
			url: "redis://:" + password + "@" + s.addr() + "/1", says: "NOPERM"},
		// Redis says "can't run this command" or "no permissions to run the 'hset' command".
		{name: "without HSET", url: without("hset"), says: "run th"},
		{name: "without HMGET", url: without("hmget"), says: "run th"},
		{name: "without HGETALL", url: without("hgetall"), says: "NOPERM"},
		{name: "without HSETNX", url: without("hsetnx"), says: "run th"},
		{name: "nobody listens", url: "redis://:secret@127.0.0.1:" + freePort(),
			says: "connection refused"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t, "REDIS_URL="+tt.url)
			for n := range int64(3) {
				a, err := ask(client, p.url)
				if err != nil || a.Status != http.StatusServiceUnavailable || a.N != n+1 {
					t.Errorf("request %d: got %+v, %v, want a 503", n+1, a, err)
				}
			}
			status, body := get(t, p.url+"/readyz")
			if status != http.StatusServiceUnavailable || !strings.Contains(body, tt.says) {
				t.Errorf("/readyz: got %d %q, want a 503 that says %q", status, body, tt.says)
			}
			time.Sleep(learned) // in which it tries again
			p.kill()
			log := p.stderr.String()
			if p.lines("cannot count in Redis") != 1 || strings.Count(log, "\n") != 2 ||
				!strings.Contains(log, tt.says) {
				t.Errorf("the log: got more or less than the start and one line that says %q:\n%s",
					tt.says, log)
			}
			if strings.Contains(log, "secret") {
				t.Errorf("the log has the password:\n%s", log)
			}
		})
	}
}

// Redis begins to refuse what counting needs: it is down, and stays so until it refuses no more.
func TestRefusedLater(t *testing.T) {
	for _, command := range []string{"hset", "hmget", "hgetall", "hsetnx"} {
		t.Run("without "+strings.ToUpper(command), func(t *testing.T) {
			t.Parallel()
			s, url := startRedis(t)
			p := startProcess(t, url, "REDIS_TIMEOUT=200ms")
			next(t, p, 1)
			var n int64 // requests counted so far
			s.do("ACL SETUSER default -" + command)
			if command == "hgetall" { // which is needed after a loss only
				s.do("FLUSHALL")
			}
			eventually(t, func() error {
				a, err := ask(client, p.url)
				if n = a.N; err != nil || a.Status != http.StatusServiceUnavailable {
					return fmt.Errorf("got %+v, %v, want a 503", a, err)
				}
				return nil
			})
			const refused = 20
			for range refused {
				if a, err := ask(client, p.url); err != nil || a.Status != http.StatusServiceUnavailable {
					t.Errorf("got %+v, %v, want a 503", a, err)
				}
				time.Sleep(100 * time.Millisecond)
			}
			n += refused
			s.do("ACL SETUSER default +" + command)
			eventually(t, func() error {
				a, err := ask(client, p.url)
				if n++; err != nil || a.Status != http.StatusOK || a.Total != n {
					return fmt.Errorf("allowed again: got %+v, %v, want a 200 and %d", a, err, n)
				}
				return nil
			})
			p.kill()
			for _, message := range []string{"cannot count in Redis", "counting in Redis again"} {
				if got := p.lines(message); got != 1 {
					t.Errorf("lines that say %q: got %d, want 1, in:\n%s", message, got, &p.stderr)
				}
			}
		})
	}
}
