package faults

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A badClient does something to the server on connections of its own.
type badClient struct {
	name       string
	n, atATime int                    // connections
	counted    int                    // most of its requests that may be counted
	run        func(nc net.Conn) bool // says whether that went as it should
}

const plainGet = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"

var badClients = []badClient{
	{name: "1,000 that send a byte a second", n: 1000, atATime: 1000, run: func(nc net.Conn) bool {
		for _, b := range []byte(plainGet[:8]) {
			if _, err := nc.Write([]byte{b}); err != nil {
				return true
			}
			time.Sleep(time.Second)
		}
		return false // it was not cut off
	}},
	{name: "headers of a megabyte", n: 100, atATime: 10, run: func(nc net.Conn) bool {
		large := "X-Large: " + strings.Repeat("x", 1<<20) + "\r\n\r\n"
		go io.WriteString(nc, strings.TrimSuffix(plainGet, "\r\n")+large)
		// The server may hang up before it has read all of it.
		status, _ := bufio.NewReader(nc).ReadString('\n')
		return status == "HTTP/1.1 431 Request Header Fields Too Large\r\n" || status == ""
	}},
	{name: "requests that are reset at once", n: 5000, atATime: 10, counted: 5000, run: func(nc net.Conn) bool {
		io.WriteString(nc, plainGet)
		return true
	}},
}

// runAll runs it on all its connections. These end by a reset, so that none is left in the kernel.
func (bad badClient) runAll(t *testing.T, addr string) {
	var started, wrong atomic.Int64
	var wg sync.WaitGroup
	for range bad.atATime {
		wg.Go(func() {
			for started.Add(1) <= int64(bad.n) {
				nc, err := net.Dial("tcp", addr)
				if err != nil {
					t.Error(err)
					return
				}
				nc.SetDeadline(time.Now().Add(20 * time.Second))
				nc.(*net.TCPConn).SetLinger(0)
				if !bad.run(nc) {
					wrong.Add(1)
				}
				nc.Close()
			}
		})
	}
	wg.Wait()
	if wrong.Load() > 0 {
		t.Errorf("connections of %s that went wrong: got %d, want 0", bad.name, wrong.Load())
	}
}

// Whatever bad clients do, the good one beside them gets its answers, and the
// server lets go of what they took.
func TestManyBadClients(t *testing.T) {
	s, url := startRedis(t)
	f := &fleet{t: t, redis: s}
	p := startProcess(t, url)
	counted := 0
	askGood := func(when string) {
		if a, err := ask(client, p.url); err != nil || a.Status != http.StatusOK {
			t.Errorf("%s: the good client got %+v, %v, want a 200", when, a, err)
		}
	}
	for _, bad := range badClients {
		stop, good := make(chan struct{}), make(chan []time.Duration)
		go func() {
			var took []time.Duration
			for {
				select {
				case <-stop:
					good <- took
					return
				case <-time.After(time.Millisecond):
				}
				began := time.Now()
				askGood(bad.name)
				took = append(took, time.Since(began))
			}
		}()
		bad.runAll(t, p.addr)
		close(stop)
		took := <-good
		slices.Sort(took)
		counted += len(took)
		counted = f.total("after "+bad.name, counted, bad.counted)
		const kept = 20 // it listens, and is connected to Redis and to the good client
		left := p.connections(t, kept)
		t.Logf("%s: the good client's %d answers took %v in the middle and %v at the most",
			bad.name, len(took), took[len(took)/2], took[len(took)-1])
		if left > kept {
			t.Errorf("%s: got %d connections left, want %d at the most", bad.name, left, kept)
		}
	}
	if most := p.memory(t); most > 100<<10 { // the chart allows more
		t.Errorf("resident: got %d kB at the most, want up to %d", most, 100<<10)
	}
	p.kill()
	if n := strings.Count(p.stderr.String(), "\n"); n > 5 {
		t.Errorf("lines logged: got %d, want 5 at the most:\n%.2000s", n, &p.stderr)
	}
}

// connections returns how many sockets the process has open, once they are no
// more than enough, or after 5 s.
func (p *process) connections(t *testing.T, enough int) int {
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, file := range files {
			if to, _ := os.Readlink(file); strings.HasPrefix(to, "socket:") {
				n++
			}
		}
		if n <= enough || time.Since(began) > 5*time.Second {
			return n
		}
	}
}

// memory returns the most that was resident, in kB.
func (p *process) memory(t *testing.T) (kB int) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	_, value, _ := strings.Cut(string(status), "VmHWM:")
	if _, scanErr := fmt.Sscan(value, &kB); scanErr != nil {
		t.Fatal(err, scanErr)
	}
	return kB
}
