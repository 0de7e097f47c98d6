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
	"net"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
)

func TestEncode(t *testing.T) {
	t.Parallel()
	got := encode("SET", "", "a\r\nb")
	if want := "*3\r\n$3\r\nSET\r\n$0\r\n\r\n$4\r\na\r\nb\r\n"; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func replyReader(text string) *bufio.Reader { return bufio.NewReader(strings.NewReader(text)) }

func TestReadReply(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		kind byte
		text string
		want reply
		err  string // part of the error; empty for none
	}{
		{':', ":0\r\n", reply{n: 0}, ""},
		{':', ":-3\r\n", reply{n: -3}, ""},
		{':', ":9223372036854775807\r\n", reply{n: 1<<63 - 1}, ""},
		{'+', "+\r\n", reply{}, ""},
		{'+', "+OK\r\n", reply{text: "OK"}, ""},
		{'$', "$0\r\n\r\n", reply{}, ""},
		{'$', "$4\r\na\r\nb\r\n", reply{text: "a\r\nb"}, ""},
		{'*', "*0\r\n", reply{}, ""},
		{'*', "*2\r\n$1\r\na\r\n$2\r\nbc\r\n", reply{list: []string{"a", "bc"}}, ""},
		{':', ":9223372036854775808\r\n", reply{}, "malformed reply of kind ':'"},
		{':', ":\r\n", reply{}, "malformed reply"},
		{':', ":1 \r\n", reply{}, "malformed reply"},
		{'$', "$-1\r\n", reply{}, "malformed reply"},
		{'$', "$1048577\r\n", reply{}, "malformed reply"},
		{'*', "*x\r\n", reply{}, "malformed reply"},
		{':', "+12\r\n", reply{}, "reply of kind '+': want ':'"},
		{'*', "*1\r\n:1\r\n", reply{}, "reply of kind ':': want '$'"},
		{'*', "*1\r\n*1\r\n*1\r\n", reply{}, "reply of kind '*': want '$'"},
		{':', "\r\n", reply{}, "malformed reply line"},
		{':', ":1\n", reply{}, "malformed reply line"},
		{':', ":1", reply{}, "EOF"},
		{'$', "$2\r\na", reply{}, "EOF"},
		{'*', "*2\r\n$1\r\na\r\n", reply{}, "EOF"},
		{':', "", reply{}, "EOF"},
		{':', "-NOPERM no\r\n", reply{}, "NOPERM no"},
		{'*', "*1\r\n-NOPERM no\r\n", reply{}, "NOPERM no"},
		{':', strings.Repeat("x", 1<<20), reply{}, "buffer full"},
	} {
		got, err := readReply(replyReader(tt.text), tt.kind)
		if tt.err == "" && (err != nil || !reflect.DeepEqual(got, tt.want)) ||
			tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%.20q: got %+v, %v; want %+v, %q", tt.text, got, err, tt.want, tt.err)
		}
	}
}

// Whatever a peer sends, the reader returns an error or what it sent.
func FuzzReadReply(f *testing.F) {
	for _, seed := range []string{":1\r\n", "+OK\r\n", "-ERR\r\n", "*1\r\n$1\r\na\r\n", ":-0\r\n", ":1\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		for _, kind := range []byte(":+$*") {
			got, err := readReply(replyReader(string(sent)), kind)
			if err != nil {
				continue
			}
			if sent[0] != kind {
				t.Errorf("%q read as a reply of kind %q", sent, kind)
			}
			if line, _, _ := bytes.Cut(sent[1:], []byte("\r\n")); kind == ':' && got.n != 0 {
				if text := strings.TrimLeft(string(line), "+-0"); !strings.Contains(fmt.Sprint(got.n), text) {
					t.Errorf("%q read as %d", sent, got.n)
				}
			}
			for _, part := range append(got.list, got.text) {
				if !bytes.Contains(sent, []byte(part)) {
					t.Errorf("%q read as %q", sent, part)
				}
			}
		}
	})
}

func TestParseRedisURL(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		url   string
		addr  string
		greet [][]string
		tls   string // name to verify
	}{
		{url: "redis://host", addr: "host:6379"},
		{url: "redis://host/", addr: "host:6379"},
		{url: "redis://host/0", addr: "host:6379"},
		{url: "redis://host/03", addr: "host:6379", greet: [][]string{{"SELECT", "3"}}},
		{url: "valkey://host:1234/15", addr: "host:1234", greet: [][]string{{"SELECT", "15"}}},
		{url: "redis://[::1]:1234", addr: "[::1]:1234"},
		{url: "redis://[::1]", addr: "[::1]:6379"},
		{url: "redis://:p%40ss@host", addr: "host:6379", greet: [][]string{{"AUTH", "p@ss"}}},
		{url: "redis://ann:p%3a%2f@host/2", addr: "host:6379", greet: [][]string{{"AUTH", "ann", "p:/"}, {"SELECT", "2"}}},
		{url: "rediss://host", addr: "host:6379", tls: "host"},
		{url: "valkeys://10.0.0.1", addr: "10.0.0.1:6379", tls: "10.0.0.1"},
	} {
		s := mustParse(t, tt.url, time.Second)
		name := ""
		if s.tls != nil {
			name = s.tls.ServerName
		}
		if s.addr != tt.addr || !reflect.DeepEqual(s.greet, tt.greet) || name != tt.tls || s.timeout != time.Second {
			t.Errorf("%s: got addr %s, greet %q, tls %q; want %s, %q, %q",
				tt.url, s.addr, s.greet, name, tt.addr, tt.greet, tt.tls)
		}
	}
}

// What the script adds and answers, whatever Redis holds and in whatever order commands
// arrive. Each step goes on from the one before it.
func TestScript(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	ledger := "{" + n.key + "}:ledger"
	raise := func(args string) []string {
		return append([]string{"EVAL", script, "2", n.key, ledger}, strings.Split(args, " ")...)
	}
	refusing := raise("19 a 12 ")
	refusing[1] = strings.ReplaceAll(script, "'HSET'", "'REFUSED'")
	for _, step := range []struct {
		name          string
		cmd           []string
		answer, total string // an answer with a … is only the beginning
	}{
		{"nothing yet", raise(""), ":0", "0"},
		{"a first batch", raise("0 a 5 "), ":5", "5"},
		{"the same again", raise("0 a 5 "), ":5", "5"},
		{"the next one", raise("5 a 7 "), ":7", "7"},
		{"the first one, late", raise("0 a 5 "), ":7", "7"},
		{"another connection", raise("7 b 10 "), ":17", "17"},
		{"the second one again", raise("5 a 7 "), ":7", "17"},
		{"the total", raise(""), ":17", "17"},
		{"a batch of one who knows more", raise("18 a 8 "), "-BEHIND …", "17"},
		{"that one after a sync", raise("17 a 9 "), ":19", "19"},
		{"a batch whose HSET is refused", refusing, "-…", "19"},
		{"an older copy, as after a failover", []string{"HSET", ledger, "a", "6 16"}, ":0", "19"},
		{"its entry put back as it was, and others", raise(" a 9 19 b 8 9 c 2 0"), ":0", "24"},
		{"the last batch again: its answer is as before", raise("7 a 9 "), ":19", "24"},
		{"Redis forgets", []string{"DEL", n.key, ledger}, ":2", ""},
		{"a batch then", raise("24 a 10 "), "-BEHIND …", "0"},
		{"one who knows nothing counts", raise("0 e 1 "), ":1", "1"},
		{"the total is lowered by hand", []string{"SET", n.key, "-95"}, "+OK", "-95"},
		{"a batch below zero", raise("-95 e 2 "), ":-94", "-94"},
		{"the same again", raise("-95 e 2 "), ":-94", "-94"},
		{"one who knows more", raise("-93 e 3 "), "-BEHIND …", "-94"},
		{"an entry that is no count", []string{"HSET", ledger, "e", "2 -94 "}, ":0", "-94"},
		{"a batch of it", raise("-94 e 3 "), "-ERR the ledger has no count at e: 2 -94…", "-94"},
		{"large numbers", raise("-94 f 9007199254740000 "), ":9007199254739906", "9007199254739906"},
		{"and one more", raise("9007199254739906 f 9007199254740001 "), ":9007199254739907", "9007199254739907"},
		{"the same again", raise("9007199254739906 f 9007199254740001 "), ":9007199254739907", "9007199254739907"},
		{"a total that is too large", []string{"SET", n.key, "9223372036854775807"}, "+OK", "9223372036854775807"},
		{"a batch then", raise("0 f 9007199254740002 "), "-ERR the total is beyond 2^53…", "9223372036854775807"},
		{"the total is no number", []string{"SET", n.key, "12a"}, "+OK", "12a"},
		{"a batch then", raise("0 f 9007199254740002 "), "-ERR …", "12a"},
	} {
		answer := strings.TrimSuffix(n.do(step.cmd), "\r\n")
		want, begins := strings.CutSuffix(step.answer, "…")
		if !begins && answer != want || !strings.HasPrefix(answer, want) {
			t.Errorf("%s: got %q, want %q", step.name, answer, step.answer)
		}
		total := strings.Split(n.do([]string{"GET", n.key}), "\r\n")[1] // "" for none
		if total != step.total {
			t.Errorf("%s: got the total %s, want %s", step.name, total, step.total)
		}
	}
}

// A fakeRedis is a function of a command, and of DIAL with an address, that says what comes of
// it: a reply, silent or closed. It may be called by several goroutines at a time.
type fakeRedis func(cmd []string) string

const (
	silent = ""       // no reply; a dial takes all its time
	closed = "closed" // the connection is closed; a dial is refused
)

// server returns how to reach it, with a timeout of 1 s.
func (f fakeRedis) server(t *testing.T, url string) *redisServer {
	s := mustParse(t, url, time.Second)
	s.dial = func(ctx context.Context, _, addr string) (net.Conn, error) {
		switch f([]string{"DIAL", addr}) {
		case silent:
			<-ctx.Done()
			return nil, ctx.Err()
		case closed:
			return nil, errors.New("connection refused")
		}
		client, server := net.Pipe()
		go f.serve(server)
		return client, nil
	}
	return s
}

func (f fakeRedis) serve(nc net.Conn) {
	defer nc.Close()
	for r := bufio.NewReader(nc); ; {
		cmd, err := readReply(r, '*')
		if err != nil {
			return
		}
		answer := f(cmd.list)
		if answer == closed {
			return
		}
		if _, err := io.WriteString(nc, answer); err != nil {
			return
		}
	}
}

// A scripted Redis does what it is told with each dial and command in turn, and then answers :7.
type scripted struct {
	mu             sync.Mutex
	dials, answers []string // what comes of them
	addrs, sent    []string // where it was dialed, and the names of the commands
}

func (s *scripted) answer(cmd []string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	next, answer := &s.answers, ":7\r\n"
	if cmd[0] == "DIAL" {
		next, answer = &s.dials, "+OK\r\n"
		s.addrs = append(s.addrs, cmd[1])
	} else {
		s.sent = append(s.sent, cmd[0])
	}
	if len(*next) > 0 {
		answer, *next = (*next)[0], (*next)[1:]
	}
	return answer
}

// What comes of a command, how long it takes, and how often Redis is dialed. An error says which
// address was tried and what the cause was, and never the password.
func TestTry(t *testing.T) {
	const half = 500 * time.Millisecond
	const password = "redis://:secret@fake"
	many := func(answer string, n int) []string { return slices.Repeat([]string{answer}, n) }
	for _, tt := range []struct {
		name    string
		url     string        // redis://fake unless set
		timeout time.Duration // 1 s unless set
		kept    bool          // a connection is there from before
		down    bool
		dials   []string
		answers []string
		took    time.Duration
		dialed  int
		err     string // its end; empty for none
	}{
		{name: "an answer", dialed: 1},
		{name: "an answer over the kept one", kept: true},
		{name: "kept, closed", kept: true, answers: many(closed, 1), dialed: 1},
		{name: "kept, dead in silence", kept: true, answers: many(silent, 1), took: half, dialed: 1},
		{name: "kept, dead in silence, then another", kept: true, answers: many(silent, 2), took: 2*half + 2*minPause, dialed: 2},
		{name: "an error reply", answers: many("-LOADING\r\n", 1), took: minPause, dialed: 2},
		{name: "an empty error reply", answers: many("-\r\n", 1), took: minPause, dialed: 2},
		{name: "a malformed reply", answers: many(":12a\r\n", 1), took: minPause, dialed: 2},
		{name: "an error reply to AUTH", url: password, answers: []string{"-WRONGPASS\r\n", "+OK\r\n"}, took: minPause, dialed: 2},
		{name: "a host that is silent", dials: many(silent, 1), took: half + minPause, dialed: 2},
		{name: "the same, with more time", timeout: 5 * time.Second, dials: many(silent, 1), took: dialTimeout + minPause, dialed: 2},
		{name: "refused for 950 ms", dials: many(closed, 12), took: 950 * time.Millisecond, dialed: 13},
		{name: "an unknown script", answers: many("-NOSCRIPT No matching script.\r\n", 1), dialed: 1},
		{name: "MOVED", answers: many("-MOVED 866 node:1\r\n", 1), dialed: 2},
		{name: "MOVED to nobody", dials: []string{"+OK\r\n", closed}, answers: many("-MOVED 866 node:1\r\n", 1), took: minPause, dialed: 3},
		{name: "MOVED to nonsense", dials: []string{"+OK\r\n", closed}, answers: many("-MOVED 866 nonsense\r\n", 1), took: minPause, dialed: 3},
		{name: "behind", answers: many("-"+string(errBehind)+"\r\n", 1), dialed: 1, err: string(errBehind)},
		{name: "refused for good", dials: many(closed, 20), took: 1050 * time.Millisecond, dialed: 14,
			err: "fake:6379: connection refused"},
		{name: "silent for good", answers: many(silent, 20), took: 3*half + 30*time.Millisecond, dialed: 3,
			err: "fake:6379: read pipe: i/o timeout"},
		{name: "down", down: true, dials: many(closed, 1), dialed: 1, err: "fake:6379: connection refused"},
		{name: "down, kept", down: true, kept: true, answers: many(closed, 1), dialed: 1},
		{name: "down, closed", down: true, answers: many(closed, 1), dialed: 1, err: "fake:6379: EOF"},
		{name: "down, a word for a reply", down: true, answers: many("secret\r\n", 1), dialed: 1,
			err: "fake:6379: reply of kind 's': want ':'"},
		{name: "down, an error after MOVED", down: true, answers: []string{"-MOVED 1 node:6380\r\n", "-ERR no\r\n"}, dialed: 2,
			err: "node:6380: ERR no"},
		{name: "down, no AUTH", down: true, url: password, dialed: 1,
			answers: many("-ERR unknown command 'AUTH', with args beginning with: 'secret'\r\n", 1),
			err:     "fake:6379: AUTH: ERR unknown command 'AUTH'"},
		{name: "down, an echo of AUTH", down: true, url: password, dialed: 1,
			answers: many(string(encode("AUTH", "secret")), 1),
			err:     "fake:6379: AUTH: reply of kind '*': want '+'"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &scripted{}
				server := fakeRedis(s.answer).server(t, cmp.Or(tt.url, "redis://fake"))
				server.timeout = cmp.Or(tt.timeout, time.Second)
				c := newConn(server, "k", "host:1/X/1")
				defer func() { c.close() }()
				if tt.kept {
					c.raise(0, 1)
				}
				s.dials, s.answers, s.addrs = tt.dials, tt.answers, nil
				server.down.Store(tt.down)
				began := time.Now()
				n, err := c.raise(1, 2)
				if took := time.Since(began); took != tt.took || len(s.addrs) != tt.dialed {
					t.Errorf("took %v and %d dials; want %v and %d", took, len(s.addrs), tt.took, tt.dialed)
				}
				if (err != nil) != (tt.err != "") || err == nil && n != 7 ||
					err != nil && !strings.HasSuffix(err.Error(), tt.err) {
					t.Errorf("got %d, %v; want 7 or %s", n, err, tt.err)
				}
			})
		})
	}
}

// The script is sent whole only where Redis does not know it. MOVED is followed, and any failure
// there leads back to the server's address.
func TestNoScriptAndMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{answers: []string{"-NOSCRIPT No matching script.\r\n", ":1\r\n",
			"-MOVED 866 fd00::2:6379\r\n", ":2\r\n", "-LOADING\r\n", "-MOVED 866 ?:1\r\n"}}
		c := newConn(fakeRedis(s.answer).server(t, "redis://fake"), "k", "host:1/X/1")
		defer c.close()
		for i := range int64(3) {
			if _, err := c.raise(i, i+1); err != nil {
				t.Error(err)
			}
		}
		if want := []string{"EVALSHA", "EVAL", "EVALSHA", "EVALSHA"}; !slices.Equal(s.sent[:4], want) {
			t.Errorf("got the commands %q, want first %q", s.sent, want)
		}
		if want := []string{"fake:6379", "[fd00::2]:6379", "fake:6379", "fake:1"}; !slices.Equal(s.addrs, want) {
			t.Errorf("dialed %q, want %q", s.addrs, want)
		}
	})
}

func TestMovedAddr(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"MOVED 3999 10.0.0.2:6381":     "10.0.0.2:6381",
		"MOVED 3999 node.example:6381": "node.example:6381",
		"MOVED 3999 fd00::2:6379":      "[fd00::2]:6379",
		"MOVED 3999 ::1:6379":          "[::1]:6379",
		"MOVED 3999 [fd00::2]:6379":    "[fd00::2]:6379",
		"MOVED 3999 :6380":             "asked:6380",
		"MOVED 3999 ?:6379":            "asked:6379",
	} {
		if got := movedAddr(text, "asked:1"); got != want {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
}

// Where a kept connection has failed, the others are dialed anew, once. An error reply is no such
// failure, nor is a dial that fails.
func TestOneDeadAllDialedAnew(t *testing.T) {
	for _, tt := range []struct {
		name           string
		dials, answers []string
		want           int
	}{
		{"silent", nil, []string{silent}, 9},
		{"closed", nil, []string{closed}, 9},
		{"an error reply", nil, []string{"-LOADING\r\n"}, 6},
		{"a dial that fails", []string{closed}, nil, 6},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := &scripted{}
			server := fakeRedis(s.answer).server(t, "redis://fake")
			var conns [5]*conn // the last one is dialed later
			for i := range conns {
				conns[i] = newConn(server, "k", fmt.Sprint("host:1/X/", i))
				defer func() { conns[i].close() }()
			}
			for _, c := range conns[:4] {
				c.raise(0, 1)
			}
			s.dials, s.answers = tt.dials, tt.answers
			for i := range 10 {
				conns[i%5].raise(0, 1)
			}
			if len(s.addrs) != tt.want {
				t.Errorf("%s: got %d dials of 5 connections, want %d", tt.name, len(s.addrs), tt.want)
			}
		})
	}
}

// A ledger is put back in commands of a thousand entries each. What is no entry is passed over.
func TestRestoreInParts(t *testing.T) {
	t.Parallel()
	n := newNetwork(t)
	const size = 2*chunk + 1
	lacking := map[string]entry{}
	for i := range int64(size) {
		lacking[fmt.Sprint("host:1/Y/", i)] = entry{i + 1, 7}
	}
	synctest.Test(t, func(t *testing.T) {
		s := &scripted{}
		c := newConn(fakeRedis(func(cmd []string) string {
			s.answer(cmd)
			if len(cmd) > 6+3*chunk {
				t.Errorf("got a command of %d words", len(cmd))
			}
			return n.answer(cmd)
		}).server(t, "redis://fake"), n.key, "host:1/X/1")
		defer c.close()
		c.total() // Redis knows the script then
		s.sent = nil
		if err := c.restore(lacking); err != nil || len(s.sent) != 3 {
			t.Errorf("got %d commands, %v; want 3", len(s.sent), err)
		}
		if total, err := c.total(); total != size*(size+1)/2 || err != nil {
			t.Errorf("got the total %d, %v; want %d", total, err, size*(size+1)/2)
		}
		n.do([]string{"HSET", c.ledgerKey, "odd", "x", "odder", "5 x", "long", strings.Repeat("5", 5000)})
		if got, err := c.entries(); !reflect.DeepEqual(got, lacking) || err != nil {
			t.Errorf("got %d entries, %v; want %d as they were", len(got), err, size)
		}
	})
}

// The certificate must name the host that is dialed, or REDIS_URL's where that is a bare address.
func TestTLS(t *testing.T) {
	t.Parallel()
	web := httptest.NewTLSServer(nil) // for its certificate, for example.com and 127.0.0.1
	defer web.Close()
	m, err := miniredis.RunTLS(&tls.Config{Certificates: web.TLS.Certificates})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	roots := x509.NewCertPool()
	roots.AddCert(web.Certificate())
	for _, tt := range []struct {
		host, dialed string
		roots        *x509.CertPool
		says         string
	}{
		{"127.0.0.1", "127.0.0.1:6379", nil, "unknown authority"},
		{"127.0.0.1", "127.0.0.1:6379", roots, ""},
		{"example.com", "10.0.0.2:6379", roots, ""},
		{"example.com", "[fd00::2]:6379", roots, ""},
		{"node.example", "example.com:6379", roots, ""},
		{"example.com", "node.example:6379", roots, "not node.example"},
	} {
		s := mustParse(t, "rediss://"+tt.host, 10*time.Second)
		s.tls.RootCAs = tt.roots
		s.dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialAlone(ctx, network, m.Addr())
		}
		c := newConn(s, "k", "host:1/X/1")
		_, err := c.attempt(tt.dialed, time.Now().Add(10*time.Second), ':', "INCRBY", "k", "1")
		c.close()
		if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s at %s: got %v; want %q", tt.host, tt.dialed, err, tt.says)
		}
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
		c.server.down.Store(true)
		_, err := c.raise(0, 1)
		c.close()
		if (err == nil) != (tt.err == "") || err != nil &&
			(!strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "secret")) {
			t.Errorf("%s: got %v, want %s", tt.url, err, tt.err)
		}
	}
	if got, err := m.DB(3).Get("k"); got != "2" || err != nil {
		t.Errorf("database 3 has %q, %v; want 2", got, err)
	}
}
