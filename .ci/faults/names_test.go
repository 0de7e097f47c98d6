package faults

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// A nameServer says that each name is 127.0.0.1's, or loses the question.
type nameServer struct {
	addr string // an IP address; the port is 53
	lose atomic.Bool
}

func newNameServer(t testing.TB) *nameServer {
	addr := fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
	s := &nameServer{addr: addr}
	conn, err := net.ListenPacket("udp", s.addr+":53")
	if err != nil {
		t.Skipf("skipped: no name server without root: %v", err)
	}
	server := &dns.Server{PacketConn: conn, Handler: s}
	go server.ActivateAndServe()
	t.Cleanup(func() { server.Shutdown() })
	return s
}

func (s *nameServer) ServeDNS(w dns.ResponseWriter, question *dns.Msg) {
	if s.lose.Load() {
		return
	}
	answer := new(dns.Msg)
	answer.SetReply(question)
	if q := question.Question[0]; q.Qtype == dns.TypeA {
		answer.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET},
			A:   net.IPv4(127, 0, 0, 1),
		}}
	}
	w.WriteMsg(answer)
}

// program returns the program with s as its only name server.
func (s *nameServer) program(t testing.TB) string {
	if out, err := exec.Command("unshare", "--mount", "true").CombinedOutput(); err != nil {
		t.Skipf("skipped: no resolv.conf of its own for a process: %v %s", err, out)
	}
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	script := filepath.Join(t.TempDir(), "requestcount")
	lines := fmt.Sprintf("#!/bin/sh\nexec unshare --mount sh -c "+
		"'mount --bind %s /etc/resolv.conf && exec %s'\n", conf, program)
	for file, text := range map[string]string{conf: "nameserver " + s.addr + "\n", script: lines} {
		if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return script
}

// lostQuestions returns a scenario in which a name server loses the questions of
// connections that are dialed again.
func lostQuestions() scenario {
	var names *nameServer
	s := scenario{name: "a name server that loses questions", timeout: "5s"}
	s.within = 2 * time.Second
	s.prepare = func(f *fleet) {
		names = newNameServer(f.t)
		f.useRedis(startServer(f.t))
		f.program = names.program(f.t)
		f.url = strings.Replace(f.url, "127.0.0.1", "redis.example", 1)
	}
	s.fault = func(f *fleet) {
		names.lose.Store(true)
		f.redis.do("CLIENT KILL USER default")
		time.Sleep(300 * time.Millisecond)
		names.lose.Store(false)
	}
	return s
}
