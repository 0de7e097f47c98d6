package faults

import (
	"bufio"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
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
	{name: "garbage", run: func(t *testing.T, addr string) (int, int) {
		eachOf(t, 1000, 10, addr, func(c net.Conn) bool {
			garbage := make([]byte, 1000)
			rand.Read(garbage)
			return request(c, string(garbage)+"\r\n\r\n") == "HTTP/1.1 400 Bad Request"
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
	{name: "a body on GET", run: func(t *testing.T, addr string) (int, int) {
		return eachOf(t, 100, 10, addr, func(c net.Conn) bool {
			text := withHeader("Content-Length: 100000") + strings.Repeat("x", 100_000)
			return request(c, text) == "HTTP/1.1 200 OK"
		}), 0
	}},
	{name: "the first 4,095 bytes arrive alone", run: func(t *testing.T, addr string) (int, int) {
		return eachOf(t, 10, 10, addr, func(c net.Conn) bool {
			text := strings.Replace(plainGet, "/ ", "/?"+strings.Repeat("q", 6000)+" ", 1)
			io.WriteString(c, text[:4095])
			time.Sleep(100 * time.Millisecond)
			return request(c, text[4095:]) == "HTTP/1.1 200 OK"
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
	f := &fleet{t: t}
	f.useRedis(startServer(t))
	p := startProcess(t, "REDIS_URL="+f.url)
	answered, more := 0, 0
	askGood := func(when string) {
		if a, err := ask(http.DefaultClient, p.url); err != nil || a.Status != http.StatusOK {
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
		t.Logf("%d kB resident, %d kB at the most, %d connections left",
			p.memory(t, "VmRSS"), p.memory(t, "VmHWM"), left)
		if left > kept {
			t.Errorf("%s: got %d connections left, want %d at the most", bad.name, left, kept)
		}
	}
	const enough, atMost = 48 << 10, 100 << 10 // kB; the chart's limit is 128 MiB
	// Go collects garbage as requests come.
	began := time.Now()
	for ; p.memory(t, "VmRSS") > enough && time.Since(began) < 30*time.Second; answered++ {
		askGood("after them")
	}
	f.total("after them", answered, more)
	if now, most := p.memory(t, "VmRSS"), p.memory(t, "VmHWM"); now > enough || most > atMost {
		t.Errorf("resident: got %d kB, and %d kB at the most, want up to %d and %d",
			now, most, enough, atMost)
	}
	p.Process.Signal(syscall.SIGQUIT) // to which Go answers with all goroutines
	<-p.exited
	log := p.stderr.String()
	goroutines := strings.Count(log, "\ngoroutine ")
	t.Logf("%d goroutines left", goroutines)
	if goroutines == 0 || goroutines > 100 { // some connections may be about to end
		t.Errorf("goroutines left: got %d, want 1 to 100", goroutines)
	}
	logged, _, _ := strings.Cut(log, "SIGQUIT")
	if n := strings.Count(logged, "\n"); n > 5 {
		t.Errorf("lines logged: got %d, want 5 at the most:\n%.2000s", n, logged)
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

// memory returns VmRSS, what is resident, or VmHWM, the most that was, in kB.
func (p *process) memory(t *testing.T, name string) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, value, _ := strings.Cut(string(status), name+":")
	kB, err := strconv.Atoi(strings.Fields(value)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kB
}
