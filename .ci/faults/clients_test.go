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

// A badClient does something to the server at addr, and returns how many of
// its requests were answered, and how many more may have been counted.
type badClient struct {
	name string
	run  func(t *testing.T, addr string) (answered, more int)
}

const plainGet = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"

// withHeader returns a request with one more header.
func withHeader(h string) string {
	return strings.TrimSuffix(plainGet, "\r\n") + h + "\r\n\r\n"
}

var badClients = []badClient{
	{name: "1,000 that send a byte a second", run: func(t *testing.T, addr string) (int, int) {
		eachOf(t, 1000, 1000, addr, func(c net.Conn) bool {
			for i := range plainGet {
				if _, err := c.Write([]byte{plainGet[i]}); err != nil {
					return true
				}
				time.Sleep(time.Second)
				if i > 7 {
					t.Error("a client that is slow to send its headers is not cut off")
					break
				}
			}
			return true
		})
		return 0, 0
	}},
	{name: "20,000 short connections", run: func(t *testing.T, addr string) (int, int) {
		return eachOf(t, 20_000, 32, addr, func(c net.Conn) bool {
			return request(c, withHeader("Connection: close")) == "HTTP/1.1 200 OK"
		}), 0
	}},
	{name: "headers of a megabyte", run: func(t *testing.T, addr string) (int, int) {
		eachOf(t, 100, 10, addr, func(c net.Conn) bool {
			// The server may hang up before it has read all of it.
			status := request(c, withHeader("X-Large: "+strings.Repeat("x", 1<<20)))
			return status == "HTTP/1.1 431 Request Header Fields Too Large" || status == ""
		})
		return 0, 0
	}},
	{name: "1,000 pipelined requests", run: func(t *testing.T, addr string) (int, int) {
		const each = 1000
		return each * eachOf(t, 10, 10, addr, func(c net.Conn) bool {
			go io.WriteString(c, strings.Repeat(plainGet, each))
			r := bufio.NewReader(c)
			for range each {
				resp, err := http.ReadResponse(r, nil)
				if err != nil || resp.StatusCode != http.StatusOK {
					return false
				}
				io.Copy(io.Discard, resp.Body)
			}
			return true
		}), 0
	}},
	{name: "requests that are reset at once", run: func(t *testing.T, addr string) (int, int) {
		return 0, eachOf(t, 5000, 10, addr, func(c net.Conn) bool {
			io.WriteString(c, plainGet)
			return true
		})
	}},
}

// eachOf runs f on n connections, so many at a time, and returns for how many
// it was true, which fails the test unless it is all. Connections end by a
// reset, so that none is left in the kernel.
func eachOf(t *testing.T, n, atATime int, addr string, f func(c net.Conn) bool) int {
	var left, good atomic.Int64
	left.Store(int64(n))
	var wg sync.WaitGroup
	for range atATime {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				c, err := net.Dial("tcp", addr)
				if err != nil {
					t.Error(err)
					return
				}
				c.SetDeadline(time.Now().Add(20 * time.Second))
				c.(*net.TCPConn).SetLinger(0)
				if f(c) {
					good.Add(1)
				}
				c.Close()
			}
		})
	}
	wg.Wait()
	if good.Load() != int64(n) {
		t.Errorf("connections that went as they should: got %d, want %d", good.Load(), n)
	}
	return int(good.Load())
}

// request sends text and returns the first line of the answer, or nothing.
func request(c net.Conn, text string) string {
	go io.WriteString(c, text)
	line, _ := bufio.NewReader(c).ReadString('\n')
	return strings.TrimRight(line, "\r\n")
}

// Whatever bad clients do, the good one beside them gets its answers, and the
// server lets go of what they took.
func TestManyBadClients(t *testing.T) {
	needRedis(t)
	s, url := startRedis(t)
	f := &fleet{t: t, redis: s}
	p := startProcess(t, url)
	answered, more := 0, 0
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
		a, m := bad.run(t, p.addr)
		close(stop)
		took := <-good
		slices.Sort(took)
		answered, more = answered+a+len(took), more+m
		const kept = 20 // it listens, and is connected to Redis and to the good client
		left := p.connections(t, kept)
		t.Logf("%s: the good client's %d answers took %v in the middle and %v at the most",
			bad.name, len(took), took[len(took)/2], took[len(took)-1])
		if left > kept {
			t.Errorf("%s: got %d connections left, want %d at the most", bad.name, left, kept)
		}
	}
	f.total("after them", answered, more)
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
