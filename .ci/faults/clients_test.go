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

var badClients = []badClient{
	{"1,000 connections that send a byte a second", func(t *testing.T, addr string) (int, int) {
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
	{"100,000 short connections", func(t *testing.T, addr string) (int, int) {
		return eachOf(t, 100_000, 32, addr, func(c net.Conn) bool {
			return request(c, strings.Replace(plainGet, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1)) == "HTTP/1.1 200 OK"
		}), 0
	}},
	{"headers of a megabyte", func(t *testing.T, addr string) (int, int) {
		eachOf(t, 100, 10, addr, func(c net.Conn) bool {
			// The server may hang up before it has read all of it.
			status := request(c, "GET / HTTP/1.1\r\nHost: localhost\r\nX-Large: "+strings.Repeat("x", 1<<20)+"\r\n\r\n")
			return status == "HTTP/1.1 431 Request Header Fields Too Large" || status == ""
		})
		return 0, 0
	}},
	{"garbage", func(t *testing.T, addr string) (int, int) {
		eachOf(t, 1000, 10, addr, func(c net.Conn) bool {
			garbage := make([]byte, 1000)
			rand.Read(garbage)
			return request(c, string(garbage)+"\r\n\r\n") == "HTTP/1.1 400 Bad Request"
		})
		return 0, 0
	}},
	{"1,000 pipelined requests", func(t *testing.T, addr string) (int, int) {
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
	{"a body on GET", func(t *testing.T, addr string) (int, int) {
		return eachOf(t, 100, 10, addr, func(c net.Conn) bool {
			return request(c, "GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"+strings.Repeat("x", 100_000)) == "HTTP/1.1 200 OK"
		}), 0
	}},
	{"requests that are reset at once", func(t *testing.T, addr string) (int, int) {
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
		t.Errorf("%d of %d connections went as they should", good.Load(), n)
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
	f.useRedis(startServer(t, ">"+password), password)
	p := startProcess(t, "REDIS_URL="+f.url)
	answered, more := 0, 0
	askGood := func(when string) {
		if a, err := ask(http.DefaultClient, p.url); err != nil || a.status != http.StatusOK {
			t.Errorf("%s: the good client got %+v, %v", when, a, err)
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
		const enough = 10 // it listens, and is connected to Redis, eight times, and to the good client
		left := p.connections(t, enough)
		t.Logf("%s: the good client's %d answers took %v in the middle and %v at the most; %d kB resident, %d kB at the most, %d connections left",
			bad.name, len(took), took[len(took)/2], took[len(took)-1], p.memory(t, "VmRSS"), p.memory(t, "VmHWM"), left)
		if left > enough {
			t.Errorf("%s: got %d connections left, want %d at the most", bad.name, left, enough)
		}
	}
	const enough = 48 << 10 // kB
	// Go collects garbage as requests come.
	for began := time.Now(); p.memory(t, "VmRSS") > enough && time.Since(began) < 30*time.Second; answered++ {
		askGood("after them")
	}
	f.total("after them", answered, more)
	// The chart's limit is 128 MiB.
	if now, most := p.memory(t, "VmRSS"), p.memory(t, "VmHWM"); now > enough || most > 100<<10 {
		t.Errorf("%d kB resident, %d kB at the most", now, most)
	}
	p.Process.Signal(syscall.SIGQUIT) // to which Go answers with all goroutines
	<-p.exited
	log := p.stderr.String()
	goroutines := strings.Count(log, "\ngoroutine ")
	t.Logf("%d goroutines left", goroutines)
	if goroutines == 0 || goroutines > 20 {
		t.Errorf("%d goroutines left", goroutines)
	}
	logged, _, _ := strings.Cut(log, "SIGQUIT")
	if n := strings.Count(logged, "\n"); n > 5 {
		t.Errorf("%d lines were logged:\n%.2000s", n, logged)
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
