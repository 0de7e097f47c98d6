package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
)

func TestAppendCommand(t *testing.T) {
	t.Parallel()
	got := appendCommand([]byte("x"), "SET", "", "a\r\nb")
	if want := "x*3\r\n$3\r\nSET\r\n$0\r\n\r\n$4\r\na\r\nb\r\n"; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func replyReader(reply string) *bufio.Reader {
	return bufio.NewReaderSize(strings.NewReader(reply), maxLine)
}

func TestReadReply(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		reply string
		want  any
		err   string // part of the error; empty for none
	}{
		{reply: ":0\r\n", want: int64(0)},
		{reply: ":-3\r\n", want: int64(-3)},
		{reply: ":9223372036854775807\r\n", want: int64(1<<63 - 1)},
		{reply: "+\r\n", want: ""},
		{reply: "+12\r\n", want: "12"},
		{reply: "$0\r\n\r\n", want: ""},
		{reply: "$4\r\na\r\nb\r\n", want: "a\r\nb"},
		{reply: "*0\r\n", want: []string(nil)},
		{reply: "*2\r\n$1\r\na\r\n+bc\r\n", want: []string{"a", "bc"}},
		{reply: ":9223372036854775808\r\n", err: "unexpected reply"},
		{reply: ":\r\n", err: "unexpected reply"},
		{reply: ":1 \r\n", err: "unexpected reply"},
		{reply: "_\r\n", err: "unexpected reply"},
		{reply: "$-1\r\n", err: "unexpected reply"},
		{reply: "$4097\r\n", err: "unexpected reply"},
		{reply: "*1\r\n:1\r\n", err: "unexpected reply of type int64: want string"},
		{reply: "*1\r\n*1\r\n*1\r\n", err: "unexpected reply"},
		{reply: "\r\n", err: "malformed reply line"},
		{reply: ":1\n", err: "malformed reply line"},
		{reply: ":1", err: "EOF"},
		{reply: "$2\r\na", err: "EOF"},
		{reply: "*2\r\n$1\r\na\r\n", err: "EOF"},
		{reply: "", err: "EOF"},
		{reply: "-NOPERM no\r\n", err: "NOPERM no"},
		{reply: "*1\r\n-NOPERM no\r\n", err: "NOPERM no"},
		{reply: strings.Repeat("x", 1<<20), err: "longer than 4096 bytes"},
	} {
		got, err := readReply(replyReader(tt.reply), true)
		if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) || tt.err == "" && (err != nil || !reflect.DeepEqual(got, tt.want)) {
			t.Errorf("%.20q: got %#v, %v; want %#v, %q", tt.reply, got, err, tt.want, tt.err)
		}
	}
	if n, err := read[int64](replyReader("+12\r\n")); err == nil || err.Error() != "unexpected reply of type string: want int64" {
		t.Errorf("a string for an integer: got %d, %v", n, err)
	}
}

// Whatever a peer sends, the reader returns an error or what it sent.
func FuzzReadReply(f *testing.F) {
	for _, seed := range []string{":1\r\n", "-ERR\r\n", "*1\r\n$1\r\na\r\n", ":-0\r\n", "\n", ":1\n", strings.Repeat("9", maxLine+1)} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		reply, err := readReply(replyReader(string(sent)), true)
		switch reply := reply.(type) {
		case int64:
			line, _, ended := bytes.Cut(sent, []byte("\r\n"))
			if n, bad := strconv.ParseInt(string(line[1:]), 10, 64); !ended || bad != nil || n != reply || sent[0] != ':' {
				t.Errorf("%q read as %d", sent, reply)
			}
		case string:
			if err == nil && !bytes.Contains(sent, []byte(reply)) {
				t.Errorf("%q read as %q", sent, reply)
			}
		case []string:
			for _, part := range reply {
				if err == nil && !bytes.Contains(sent, []byte(part)) {
					t.Errorf("%q read as %q", sent, reply)
				}
			}
		case nil:
			if err == nil {
				t.Errorf("%q read as nothing", sent)
			}
		}
	})
}

func TestParseRedisURL(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		url   string
		addr  string
		hello [][]string
		tls   string // name to verify
	}{
		{url: "redis://host", addr: "host:6379"},
		{url: "redis://host/", addr: "host:6379"},
		{url: "redis://host/0", addr: "host:6379"},
		{url: "redis://host/03", addr: "host:6379", hello: [][]string{{"SELECT", "3"}}},
		{url: "valkey://host:1234/15", addr: "host:1234", hello: [][]string{{"SELECT", "15"}}},
		{url: "redis://[::1]:1234", addr: "[::1]:1234"},
		{url: "redis://[::1]", addr: "[::1]:6379"},
		{url: "redis://:p%40ss@host", addr: "host:6379", hello: [][]string{{"AUTH", "p@ss"}}},
		{url: "redis://ann:p%3a%2f@host/2", addr: "host:6379", hello: [][]string{{"AUTH", "ann", "p:/"}, {"SELECT", "2"}}},
		{url: "rediss://host", addr: "host:6379", tls: "host"},
		{url: "valkeys://10.0.0.1", addr: "10.0.0.1:6379", tls: "10.0.0.1"},
	} {
		s := mustParse(t, tt.url, time.Second)
		name := ""
		if s.tls != nil {
			name = s.tls.ServerName
		}
		if s.addr != tt.addr || !reflect.DeepEqual(s.hello, tt.hello) || name != tt.tls || s.timeout != time.Second {
			t.Errorf("%s: got addr %s, hello %q, tls %q; want %s, %q, %q", tt.url, s.addr, s.hello, name, tt.addr, tt.hello, tt.tls)
		}
	}
}

// What the scripts add and answer, whatever Redis holds and in whatever order
// commands arrive. Each step goes on from the one before it.
func TestScript(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	key := newKey(t, url)
	keys := []string{"3", key, "{" + key + "}:instances", "{" + key + "}:ended"}
	redis := newConn(mustParse(t, url, 5*time.Second), key, "")
	t.Cleanup(redis.close)
	endRefused := append([]string{"EVAL", strings.ReplaceAll(endScript, "'INCRBY'", "'REFUSED'")}, append(keys, "8", "host:1/X", "7")...)
	run := func(cmd ...string) (int64, error) { return do[int64](redis, time.Now().Add(5*time.Second), cmd...) }
	raise := func(count, added, expected string) []string {
		return append([]string{"EVAL", script}, append(keys, "host:1/X/1", count, added, expected)...)
	}
	end := func(count string) []string {
		return append([]string{"EVAL", endScript}, append(keys, "8", "host:1/X", count)...)
	}
	refusing := raise("15", "3", "12 37")
	refusing[1] = strings.ReplaceAll(script, "'HSET'", "'REFUSED'")

	for _, step := range []struct {
		name          string
		cmd           []string
		answer, total int64
		err           string // part of the error; empty for none
	}{
		{"a first heartbeat", raise("0", "0", "0 0"), 0, 0, ""},
		{"a first batch", raise("5", "5", "0 0"), 5, 5, ""},
		{"the same again", raise("5", "5", "0 0"), 5, 5, ""},
		{"the next one", raise("7", "2", "5 5"), 7, 7, ""},
		{"the first one, late", raise("5", "5", "0 0"), 7, 7, ""},
		{"others", []string{"INCRBY", key, "10"}, 17, 17, ""},
		{"the second one again", raise("7", "2", "5 5"), 7, 17, ""},
		{"a heartbeat", raise("7", "0", "7 7"), 17, 17, ""},
		{"others", []string{"INCRBY", key, "10"}, 27, 27, ""},
		{"the heartbeat again", raise("7", "0", "7 7"), 17, 27, ""},
		{"a batch that takes a failed one along", raise("10", "3", "7 17"), 30, 30, ""},
		{"a batch that does not know of the last one", raise("11", "4", "7 17"), 31, 31, ""},
		{"an older entry and total, as after a failover", []string{"HSET", keys[2], "host:1/X/1", "6 26"}, 0, 31, ""},
		{"a batch then", raise("12", "1", "11 31"), 37, 37, ""},
		{"a batch whose HSET is refused", refusing, 0, 37, "nknown"},
		{"Redis forgets", []string{"DEL", keys[1], keys[2]}, 2, 0, ""},
		{"a heartbeat then", raise("12", "0", "12 37"), 12, 12, ""},
		{"the ledger forgets this connection only", []string{"HDEL", keys[2], "host:1/X/1"}, 1, 12, ""},
		{"a process without requests starts", raise("0", "0", "0 0"), 12, 12, ""},
		{"it counts, as another connection does", raise("4", "4", "0 12"), 16, 16, ""},
		{"the instance ends, and its INCRBY is refused", endRefused, 0, 16, "nknown"},
		{"the instance ends, three of its requests not told", end("7"), 0, 19, ""},
		{"another is told of beside it", append(end("7"), "other:1/X", "3", "host:1/X", "7"), 0, 22, ""},
		{"the ledger has no entry of them", []string{"HLEN", keys[2]}, 0, 22, ""},
		{"it is told again", end("7"), 0, 22, ""},
		{"a command of the ended instance, late", raise("7", "3", "4 16"), 0, 22, "ENDED"},
		{"Redis forgets", []string{"DEL", keys[1], keys[2], keys[3]}, 2, 0, ""},
		{"a command of the ended instance, late", raise("7", "3", "4 16"), 7, 7, ""},
		{"another instance tells of the end", end("7"), 0, 7, ""},
	} {
		answer, err := run(step.cmd...)
		if step.err != "" && (err == nil || !strings.Contains(err.Error(), step.err)) || step.err == "" && err != nil {
			t.Errorf("%s: %v, want %q", step.name, err, step.err)
		}
		if total := redisTotal(t, url, key); answer != step.answer || total != step.total {
			t.Errorf("%s: got answer %d, total %d; want %d and %d", step.name, answer, total, step.answer, step.total)
		}
	}
}

// A fakeRedis answers commands for a synctest bubble, over net.Pipe.
type fakeRedis struct {
	answer func(cmd []string) string // a reply; none for silence
	refuse func() error              // what a dial fails with; nil for nothing
	gone   atomic.Bool               // it refuses all
	deaf   bool                      // it reads and answers nothing
	muted  atomic.Int64              // so many connections, the first ones, get no answer any more

	mu     sync.Mutex
	dialed []string // addresses
}

// server returns how to reach it, with the timeout 1 s.
func (f *fakeRedis) server(t *testing.T, url string) *redisServer {
	s := mustParse(t, url, time.Second)
	s.dial = func(ctx context.Context, _, addr string) (net.Conn, error) {
		f.mu.Lock()
		f.dialed = append(f.dialed, addr)
		number := int64(len(f.dialed))
		f.mu.Unlock()
		if f.gone.Load() {
			return nil, errors.New("connection refused")
		}
		if f.refuse != nil {
			if err := f.refuse(); err != nil {
				return nil, err
			}
		}
		client, server := net.Pipe()
		go f.serve(server, number)
		return client, nil
	}
	return s
}

func (f *fakeRedis) dials() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.dialed)
}

func (f *fakeRedis) serve(nc net.Conn, number int64) {
	defer nc.Close()
	if f.deaf {
		io.Copy(io.Discard, nc)
	}
	r := bufio.NewReader(nc)
	for {
		cmd, err := read[[]string](r)
		if err != nil {
			return
		}
		if number <= f.muted.Load() {
			continue
		}
		reply := f.answer(cmd)
		if reply == "close" {
			return
		}
		if _, err := io.WriteString(nc, reply); err != nil {
			return
		}
	}
}

// zero answers as a Redis that is empty does.
func zero(cmd []string) string {
	if cmd[0] == "HGETALL" {
		return "*0\r\n"
	}
	return ":0\r\n"
}

// once returns answers that begin with the given ones and go on with :7.
func once(replies ...string) func([]string) string {
	return func([]string) string {
		if len(replies) == 0 {
			return ":7\r\n"
		}
		reply := replies[0]
		replies = replies[1:]
		return reply
	}
}

// Whatever Redis replies, also to AUTH, the command is sent again within the timeout.
func TestEveryErrorIsRetried(t *testing.T) {
	for _, reply := range []string{
		"-READONLY You can't write against a read only replica.\r\n",
		"-ERR Error running script (call to f_1): @user_script:2: @user_script: 2: -READONLY You can't write against a read only replica.\r\n",
		"-LOADING Redis is loading the dataset in memory\r\n",
		"-BUSY Redis is busy running a script.\r\n",
		"-NOREPLICAS Not enough good replicas to write.\r\n",
		"-ERR max number of clients reached\r\n",
		"-NOPERM this user has no permissions\r\n",
		"-WRONGPASS invalid username-password pair or user is disabled.\r\n",
		"-MOVED 866 nonsense\r\n", "-MOVED 866 :6380\r\n", "-ASK 866 10.0.0.2:6379\r\n",
		"-\r\n", "$-1\r\n", ":12a\r\n", ":" + strings.Repeat("1", maxLine) + "\r\n", "close",
	} {
		for _, url := range []string{"redis://fake", "redis://:secret@fake"} {
			t.Run(url+" "+reply[:min(len(reply), 20)], func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					f := &fakeRedis{answer: once(reply, "+OK\r\n")}
					if url == "redis://fake" {
						f.answer = once(reply)
					}
					c := newConn(f.server(t, url), "k", "host:1/X/1")
					defer c.close()
					if n, err := c.incrBy(1, false); n != 7 || err != nil || len(f.dials()) != 2 {
						t.Errorf("got %d, %v after %d dials; want 7 after 2", n, err, len(f.dials()))
					}
				})
			})
		}
	}
}

// The script is sent whole where Redis does not know it, over the same TCP connection.
func TestNoScript(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sent []string
		f := &fakeRedis{answer: func(cmd []string) string {
			sent = append(sent, cmd[0]+" "+cmd[1])
			if cmd[0] == "EVALSHA" {
				return "-NOSCRIPT No matching script.\r\n"
			}
			return ":7\r\n"
		}}
		c := newConn(f.server(t, "redis://fake"), "k", "host:1/X/1")
		defer c.close()
		began := time.Now()
		if n, err := c.incrBy(1, false); n != 7 || err != nil || len(f.dials()) != 1 || time.Since(began) != 0 {
			t.Errorf("got %d, %v after %d dials and %v; want 7 after 1 at once", n, err, len(f.dials()), time.Since(began))
		}
		if want := []string{"EVALSHA " + scriptSHA, "EVAL " + script}; !reflect.DeepEqual(sent, want) {
			t.Errorf("got %q, want %q", sent, want)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		f := &fakeRedis{answer: func([]string) string { return "-NOSCRIPT No matching script.\r\n" }}
		c := newConn(f.server(t, "redis://fake"), "k", "host:1/X/1")
		if n, err := c.incrBy(1, false); !isCode(err, "NOSCRIPT") {
			t.Errorf("where EVAL is answered so too: got %d, %v; want NOSCRIPT", n, err)
		}
	})
}

// An attempt that fails says which address it tried and what the cause was; a
// later attempt's want of time does not hide that.
func TestCauses(t *testing.T) {
	always := func(reply string) func([]string) string { return func([]string) string { return reply } }
	first := func(first, then error) func() error {
		return func() error {
			err := first
			first = then
			return err
		}
	}
	noHost := &net.DNSError{Err: "no such host", Name: "fake", IsNotFound: true}
	noTime := &net.DNSError{Err: "i/o timeout", Name: "fake", IsTimeout: true}
	const silence, tlsHint = "read pipe: i/o timeout", " before any reply: the port may want TLS, rediss://"
	for _, tt := range []struct {
		name    string
		url     string // redis://fake unless set
		fake    *fakeRedis
		earlier int // commands before
		once    bool
		want    string
	}{
		{name: "no such host, then no time", fake: &fakeRedis{refuse: first(noHost, noTime)}, want: "fake:6379: lookup fake: no such host"},
		{name: "silence", fake: &fakeRedis{answer: always("")}, want: "fake:6379: " + silence + tlsHint},
		{name: "silence, then refused", fake: &fakeRedis{answer: always(""), refuse: first(nil, errors.New("connection refused"))}, want: "fake:6379: connection refused"},
		{name: "silence after a reply", fake: &fakeRedis{answer: once("-NOSCRIPT No matching script.\r\n", "")}, once: true, want: "fake:6379: " + silence},
		{name: "silence after MOVED", fake: &fakeRedis{answer: once("-MOVED 1 node:6380\r\n", "")}, once: true, want: "node:6380: " + silence + tlsHint},
		{name: "closed", fake: &fakeRedis{answer: always("close")}, want: "fake:6379: EOF" + tlsHint},
		{name: "closed, after a connection that was answered", fake: &fakeRedis{answer: once(":7\r\n", "close", "close")}, earlier: 1, once: true, want: "fake:6379: EOF"},
		{name: "no TLS", url: "rediss://fake", fake: &fakeRedis{deaf: true}, want: "i/o timeout before any reply: the port may not have TLS, redis://"},
		{name: "an unknown AUTH", url: "redis://:secret@fake", fake: &fakeRedis{answer: always("-ERR unknown command 'AUTH', with args beginning with: 'secret'\r\n")},
			want: "fake:6379: AUTH: ERR unknown command 'AUTH'"},
		{name: "an echo", url: "redis://:secret@fake", fake: &fakeRedis{answer: func(cmd []string) string { return string(appendCommand(nil, cmd...)) }},
			want: `fake:6379: AUTH: unexpected reply "*2\r\n"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newConn(tt.fake.server(t, cmp.Or(tt.url, "redis://fake")), "k", "host:1/X/1")
				for range tt.earlier {
					c.incrBy(1, false)
				}
				_, err := c.incrBy(1, tt.once)
				if err == nil || !strings.HasSuffix(err.Error(), tt.want) {
					t.Errorf("got %v, want %s", err, tt.want)
				}
				if c.addr != "fake:6379" {
					t.Errorf("the next attempt goes to %s, want fake:6379", c.addr)
				}
			})
		})
	}
}

// A command ends with the timeout, and a connection that is dead in silence
// leaves half of it to a fresh one.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeRedis{answer: once("", ":1\r\n", "", ":2\r\n", "-LOADING\r\n", "", "", "")}
		c := newConn(f.server(t, "redis://fake"), "k", "host:1/X/1")
		for _, step := range []struct {
			name string
			want int64
			took time.Duration
			err  bool
		}{
			{name: "dead in silence from the first", want: 1, took: 510 * time.Millisecond},
			{name: "dead in silence", want: 2, took: 500 * time.Millisecond},
			{name: "loading, then silent for good", took: time.Second, err: true},
		} {
			began := time.Now()
			n, err := c.incrBy(1, false)
			if took := time.Since(began); n != step.want || took != step.took || (err != nil) != step.err {
				t.Errorf("%s: got %d, %v after %v; want %d after %v", step.name, n, err, took, step.want, step.took)
			}
		}
	})
}

// A host that has gone is silent: it is dialed for a second, then again.
func TestSilentHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := (&fakeRedis{answer: once()}).server(t, "redis://fake")
		s.timeout = 5 * time.Second
		dial, silent := s.dial, true
		s.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if silent {
				silent = false
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return dial(ctx, network, addr)
		}
		c := newConn(s, "k", "host:1/X/1")
		defer c.close()
		began := time.Now()
		if n, err := c.incrBy(1, false); n != 7 || err != nil || time.Since(began) != dialTimeout+minPause {
			t.Errorf("got %d, %v after %v; want 7 after %v", n, err, time.Since(began), dialTimeout+minPause)
		}
	})
}

// A suspendedConn stands for one of a process that is suspended as it waits for a reply.
type suspendedConn struct {
	net.Conn
	d time.Duration
}

func (c suspendedConn) SetDeadline(time.Time) error { return nil }
func (c suspendedConn) Write(b []byte) (int, error) {
	time.Sleep(c.d)
	return 0, os.ErrDeadlineExceeded
}

// A process that was suspended for longer than the timeout still gets another
// attempt, but not one after the other.
func TestSuspended(t *testing.T) {
	for _, tt := range []struct {
		name      string
		kept      bool
		suspended int // attempts, the first ones
		want      int64
		took      time.Duration
	}{
		{name: "on a fresh connection", suspended: 1, want: 7, took: 1310 * time.Millisecond},
		{name: "on a kept connection", kept: true, suspended: 1, want: 7, took: 1300 * time.Millisecond},
		{name: "again and again", suspended: 100, took: 2610 * time.Millisecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeRedis{answer: once()}
				s := f.server(t, "redis://fake")
				dial := s.dial
				s.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
					nc, err := dial(ctx, network, addr)
					if len(f.dials()) <= tt.suspended {
						nc = suspendedConn{nc, 1300 * time.Millisecond}
					}
					return nc, err
				}
				c := newConn(s, "k", "host:1/X/1")
				defer c.close()
				if tt.kept {
					c.dial(time.Now())
				}
				began := time.Now()
				n, err := c.incrBy(1, false)
				if took := time.Since(began); n != tt.want || (err != nil) != (tt.want == 0) || took != tt.took {
					t.Errorf("got %d, %v after %v; want %d after %v", n, err, took, tt.want, tt.took)
				}
			})
		})
	}
}

func TestMovedAddr(t *testing.T) {
	t.Parallel()
	for reply, want := range map[string]string{
		"MOVED 3999 10.0.0.2:6381":     "10.0.0.2:6381",
		"MOVED 3999 node.example:6381": "node.example:6381",
		"MOVED 3999 fd00::2:6379":      "[fd00::2]:6379",
		"MOVED 3999 ::1:6379":          "[::1]:6379",
		"MOVED 3999 [fd00::2]:6379":    "[fd00::2]:6379",
		"MOVED 3999 :6380":             "asked:6380",
	} {
		if got := movedAddr(reply, "asked:1"); got != want {
			t.Errorf("%s: got %s, want %s", reply, got, want)
		}
	}
}

// MOVED is followed, and any failure there leads back to the server's address.
func TestMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeRedis{answer: once("-MOVED 866 fd00::2:6379\r\n", ":1\r\n", "-LOADING\r\n", "-MOVED 866 node:1\r\n", ":2\r\n")}
		c := newConn(f.server(t, "redis://fake"), "k", "host:1/X/1")
		defer c.close()
		for want := int64(1); want <= 2; want++ {
			if n, err := c.incrBy(1, false); n != want || err != nil {
				t.Errorf("got %d, %v; want %d", n, err, want)
			}
		}
		if want := []string{"fake:6379", "[fd00::2]:6379", "fake:6379", "node:1"}; !reflect.DeepEqual(f.dials(), want) {
			t.Errorf("dialed %q, want %q", f.dials(), want)
		}
	})
}

// The certificate must name the host that is dialed, or REDIS_URL's for a bare address.
func TestTLSName(t *testing.T) {
	t.Parallel()
	for addr, want := range map[string]string{"host:6379": "host", "node.example:6379": "node.example", "10.0.0.2:6379": "host", "[fd00::2]:6379": "host"} {
		if got := mustParse(t, "rediss://host", 0).tlsConfig(addr).ServerName; got != want {
			t.Errorf("%s: got %s, want %s", addr, got, want)
		}
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	web := httptest.NewTLSServer(nil) // for its certificate, which is good for 127.0.0.1
	defer web.Close()
	m, err := miniredis.RunTLS(&tls.Config{Certificates: web.TLS.Certificates})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	s := mustParse(t, "rediss://"+m.Addr(), 10*time.Second)
	c := newConn(s, "k", "host:1/X/1")
	defer c.close()
	var unknown x509.UnknownAuthorityError
	if _, err := c.incrBy(1, true); !errors.As(err, &unknown) {
		t.Errorf("a certificate that the system does not trust: got %v", err)
	}
	s.tls.RootCAs = x509.NewCertPool()
	s.tls.RootCAs.AddCert(web.Certificate())
	if n, err := c.incrBy(1, false); n != 2 || err != nil {
		t.Errorf("over TLS: got %d, %v; want 2", n, err)
	}
}

func TestAuthAndSelect(t *testing.T) {
	t.Parallel()
	m := miniredis.RunT(t)
	m.RequireUserAuth("ann", "a b@c/d")
	m.RequireAuth("default")
	for _, tt := range []struct{ url, err string }{
		{"redis://ann:a%20b%40c%2Fd@" + m.Addr() + "/3", ""},
		{"redis://:default@" + m.Addr() + "/3", ""},
		{"redis://ann:secret@" + m.Addr(), "WRONGPASS"},
		{"redis://" + m.Addr(), "NOAUTH"},
	} {
		c := newConn(mustParse(t, tt.url, 5*time.Second), "k", tt.url)
		_, err := c.incrBy(1, true)
		c.close()
		if (err == nil) != (tt.err == "") || err != nil && (!strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "secret")) {
			t.Errorf("%s: got %v, want %s", tt.url, err, tt.err)
		}
	}
	if got, err := m.DB(3).Get("k"); got != "2" || err != nil {
		t.Errorf("database 3 has %q, %v; want 2", got, err)
	}
}

// A schedule is a random run of instances that share a Redis over a network
// which loses, delays and reorders what they send.
type schedule struct {
	t      *testing.T
	rng    *rand.Rand
	faulty bool // the network has faults
	redis  *conn
	key    string

	living []*counter
	ended  []*counter         // cleanly
	gone   []*counter         // crashed, or ended and forgotten by all
	late   [][]byte           // commands on their way, given up by their senders
	asked  map[*counter]int64 // requests
	told   map[int64]bool     // numbers
	latest int64              // highest number told
	lost   bool               // Redis has lost its memory: numbers may repeat
	depth  int                // of requests within requests
}

// A wire is a TCP connection over a schedule's network.
type wire struct {
	net.Conn // nil: no other method is used
	s        *schedule
	replies  bytes.Buffer
}

func (w *wire) SetDeadline(time.Time) error { return nil }
func (w *wire) Close() error                { return nil }
func (w *wire) Read(b []byte) (int, error)  { return w.replies.Read(b) } // EOF where there is none

// Write sends a command. With faults it may get lost, be delivered late, or
// lose its reply; and others may send before and after it is delivered.
func (w *wire) Write(b []byte) (int, error) {
	fate := 9
	if w.s.faulty {
		fate = w.s.rng.IntN(10)
		w.s.meanwhile()
	}
	switch fate {
	case 0:
	case 1:
		w.s.late = append(w.s.late, bytes.Clone(b))
	case 2:
		w.s.deliver(b)
	default:
		w.replies.Write(w.s.deliver(b))
		if w.s.faulty {
			w.s.meanwhile()
		}
	}
	return len(b), nil
}

// deliver has Redis carry out a command, and returns its reply.
func (s *schedule) deliver(b []byte) []byte {
	if s.redis.nc == nil {
		if err := s.redis.dial(time.Now().Add(5 * time.Second)); err != nil {
			s.t.Fatal(err)
		}
		s.redis.nc.SetDeadline(time.Time{})
	}
	if _, err := s.redis.nc.Write(b); err != nil {
		s.t.Fatal(err)
	}
	reply, err := readRaw(s.redis.r)
	if err != nil {
		s.t.Fatal(err)
	}
	return reply
}

// readRaw reads a whole reply as it is.
func readRaw(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return nil, err
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(line[1:])))
	switch line[0] {
	case '$':
		rest := make([]byte, max(n, -2)+2)
		_, err = io.ReadFull(r, rest)
		line = append(line, rest...)
	case '*':
		for ; n > 0 && err == nil; n-- {
			var part []byte
			part, err = readRaw(r)
			line = append(line, part...)
		}
	}
	return line, err
}

// meanwhile sometimes has another request come and go.
func (s *schedule) meanwhile() {
	if s.depth < 2 && s.rng.IntN(8) == 0 {
		s.request()
	}
}

func (s *schedule) start() {
	server := mustParse(s.t, "redis://network", time.Millisecond) // too short for a pause
	server.dial = func(context.Context, string, string) (net.Conn, error) { return &wire{s: s}, nil }
	c := newCounter("host:1", s.key, server)
	few := make(chan *conn, 3)
	for range cap(few) {
		few <- <-c.pool
	}
	c.pool = few
	s.living = append(s.living, c)
}

func (s *schedule) any() *counter { return s.living[s.rng.IntN(len(s.living))] }

// request sends a request to an instance, whose answer must fit all others.
func (s *schedule) request() {
	s.depth++
	defer func() { s.depth-- }()
	c, before := s.any(), s.latest
	if len(c.pool) == 0 || c.pending.size > 0 { // it would wait for one that waits for it
		return
	}
	_, total, err := c.next()
	s.asked[c]++
	if err != nil || s.lost {
		return
	}
	if total <= before || s.told[total] {
		s.t.Errorf("got request %d to the cluster after %d was told", total, before)
	}
	s.told[total], s.latest = true, max(s.latest, total)
}

// stop takes an instance out.
func (s *schedule) stop() *counter {
	i := s.rng.IntN(len(s.living))
	c := s.living[i]
	s.living = append(s.living[:i], s.living[i+1:]...)
	return c
}

// forget empties Redis, by a restart or by FLUSHALL, which instances notice
// only by what is missing.
func (s *schedule) forget(restart bool) {
	s.lost = true
	s.deliver(appendCommand(nil, "DEL", s.key, "{"+s.key+"}:instances", "{"+s.key+"}:ended"))
	for _, c := range s.living {
		if restart {
			closeAll(c)
		} else {
			c.heartbeat()
		}
	}
	s.review()
}

// review moves those of the ended instances to the gone that nobody knows any more.
func (s *schedule) review() {
	var ended []*counter
	for _, e := range s.ended {
		known := string(s.deliver(appendCommand(nil, "HEXISTS", "{"+s.key+"}:ended", e.id))) == ":1\r\n"
		for _, c := range s.living {
			known = known || c.ended[e.id] != ""
		}
		if known {
			ended = append(ended, e)
		} else {
			s.gone = append(s.gone, e)
		}
	}
	s.ended = ended
}

func (s *schedule) deliverLate() {
	if len(s.late) > 0 {
		i := s.rng.IntN(len(s.late))
		s.deliver(s.late[i])
		s.late = append(s.late[:i], s.late[i+1:]...)
	}
}

// step does one thing at random.
func (s *schedule) step() {
	switch p := s.rng.IntN(100); {
	case p < 55:
		s.request()
	case p < 70:
		s.any().heartbeat()
	case p < 82:
		s.deliverLate()
	case p < 85:
		s.forget(p < 84)
	case p < 90 && len(s.living) < 4:
		s.start()
	case p < 95 && len(s.living) > 1:
		c := s.stop()
		if endWithin(c, 0); string(s.deliver(appendCommand(nil, "HEXISTS", "{"+s.key+"}:ended", c.id))) == ":1\r\n" {
			s.ended = append(s.ended, c)
		} else {
			s.gone = append(s.gone, c)
		}
		s.review()
	case p < 98 && len(s.living) > 1:
		s.gone = append(s.gone, s.stop())
		s.review()
	}
}

// settle lets the faults end and checks the total.
func (s *schedule) settle() {
	s.faulty = false
	for range 2 {
		for _, c := range s.living {
			if err := c.heartbeat(); err != nil {
				s.t.Fatal(err)
			}
		}
		for len(s.late) > 0 {
			s.deliverLate()
		}
	}
	var least, most int64
	for _, c := range append(s.living, s.ended...) {
		if c.n != s.asked[c] {
			s.t.Errorf("the instance counts %d requests, want %d", c.n, s.asked[c])
		}
		least += c.n
	}
	most = least
	for _, c := range s.gone {
		most += c.n
		for range len(c.pool) {
			if conn := <-c.pool; !s.lost {
				least += conn.noted
			}
		}
	}
	reply := string(s.deliver(appendCommand(nil, "INCRBY", s.key, "0")))
	if total, err := strconv.ParseInt(strings.Trim(reply, ":\r\n"), 10, 64); err != nil || total < least || total > most {
		s.t.Errorf("the total is %d, %v; want %d to %d", total, err, least, most)
	}
}

// Whatever the network does, and whoever ends, crashes or forgets, no number is
// told twice as long as Redis keeps its memory, and the total ends up exact.
func TestRandomSchedules(t *testing.T) {
	t.Parallel()
	url := startRedis(t)
	seeds := make(chan uint64)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			redis := newConn(mustParse(t, url, 5*time.Second), "", "")
			defer redis.close()
			for seed := range seeds {
				runSchedule(t, redis, seed)
			}
		})
	}
	schedules := uint64(250)
	if realRedis != "" {
		schedules = 5000 // a real Redis runs Lua ten times as fast
	}
	for i := range schedules {
		if t.Failed() {
			break
		}
		seeds <- i
	}
	close(seeds)
	wg.Wait()
}

func runSchedule(t *testing.T, redis *conn, seed uint64) {
	s := &schedule{t: t, rng: rand.New(rand.NewPCG(seed, 0)), faulty: true, redis: redis,
		key: fmt.Sprint("test:", rand.Uint64()), told: map[int64]bool{}, asked: map[*counter]int64{}}
	defer s.deliver(appendCommand(nil, "DEL", s.key, "{"+s.key+"}:instances", "{"+s.key+"}:ended"))
	s.start()
	for range 20 + s.rng.IntN(20) {
		s.step()
	}
	if s.settle(); t.Failed() {
		t.Errorf("seed %d", seed)
	}
}
