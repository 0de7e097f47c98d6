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
	"strconv"
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
		{'*', "*9223372036854775807\r\n", reply{}, "EOF"},
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
	const lost = "-" + string(errLost)
	eval := func(args string) []string {
		return append([]string{"EVAL", script, "1", n.key}, strings.Split(args, " ")...)
	}
	hash := func(command string) []string {
		name, fields, _ := strings.Cut(command, " ")
		return append([]string{name, n.key}, strings.Split(fields, " ")...)
	}
	refused := eval("e1 22 next a 12 ")
	refused[1] = strings.ReplaceAll(script, "'HSET'", "'REFUSED'")
	for _, step := range []struct {
		name                 string
		cmd                  []string
		answer, epoch, total string // an answer with a … is only the beginning
	}{
		{"nothing yet: an epoch begins", eval(" 0 e1"), lost, "e1", ""},
		{"the same again", eval(" 0 e1"), lost, "e1", ""},
		{"another one meanwhile", eval(" 0 e2"), lost, "e1", ""},
		{"a look", eval("e1 0 next"), ":0", "e1", "0"},
		{"a first batch", eval("e1 0 next a 5 "), ":5", "e1", "5"},
		{"the same again", eval("e1 0 next a 5 "), ":5", "e1", "5"},
		{"the next one", eval("e1 5 next a 7 "), ":7", "e1", "7"},
		{"the first one, late", eval("e1 0 next a 5 "), ":7", "e1", "7"},
		{"another connection", eval("e1 7 next b 10 "), ":17", "e1", "17"},
		{"the second one again", eval("e1 5 next a 7 "), ":7", "e1", "17"},
		{"a look", eval("e1 17 next"), ":17", "e1", "17"},
		{"what Redis has is restored", eval("e1 17 next a 7 7 b 9 16"), ":17", "e1", "17"},
		{"what Redis lacks is restored", eval("e1 17 next a 9 0 c 2 12"), ":21", "e1", "21"},
		{"the batch of that again", eval("e1 17 next c 2 "), ":12", "e1", "21"},
		{"a batch of another epoch", eval("e0 99 next a 10 "), lost, "e1", "21"},
		{"a batch whose HSET is refused", refused, "-…", "e1", "21"},
		{"a batch of one who knows more: an older copy", eval("e1 22 e2 a 10 "), lost, "e2", "21"},
		{"the same again", eval("e1 22 e2 a 10 "), lost, "e2", "21"},
		{"that one in the next epoch", eval("e2 21 next a 10 "), ":22", "e2", "22"},
		{"an epoch without a name", hash("HSET epoch "), ":0", "", "22"},
		{"a look then", eval(" 0 e3"), lost, "e3", "22"},
		{"Redis forgets", hash("DEL"), ":1", "", ""},
		{"a batch then", eval("e3 22 e4 a 11 "), lost, "e4", ""},
		{"one who knows nothing counts", eval("e4 0 next e 1 "), ":1", "e4", "1"},
		{"the total is lowered by hand", hash("HSET total -95"), ":0", "e4", "-95"},
		{"a batch below zero", eval("e4 -95 next e 2 "), ":-94", "e4", "-94"},
		{"the same again", eval("e4 -95 next e 2 "), ":-94", "e4", "-94"},
		{"an entry that is no count", append(hash("HSET e"), "2 -94 "), ":0", "e4", "-94"},
		{"a batch of it", eval("e4 -94 next e 3 "), "-ERR the ledger has no count at e: 2 -94…", "e4", "-94"},
		{"large numbers", eval("e4 -94 next f 9007199254740000 "), ":9007199254739906", "e4", "9007199254739906"},
		{"and one more", eval("e4 9007199254739906 next f 9007199254740001 "), ":9007199254739907", "e4", "9007199254739907"},
		{"the same again", eval("e4 9007199254739906 next f 9007199254740001 "), ":9007199254739907", "e4", "9007199254739907"},
		{"a total that is too large", hash("HSET total 9223372036854775807"), ":0", "e4", "9223372036854775807"},
		{"a batch then", eval("e4 0 next f 9007199254740002 "), "-ERR the total is no whole number below 2^53: 92233…", "e4", "9223372036854775807"},
		{"the total is no number", hash("HSET total 12a"), ":0", "e4", "12a"},
		{"a batch then", eval("e4 0 next f 9007199254740002 "), "-ERR the total is no whole number below 2^53: 12a…", "e4", "12a"},
	} {
		if strconv.IntSize == 32 && strings.Contains(fmt.Sprint(step.cmd[1:]), "9007199254740") {
			continue // miniredis' Lua cannot write these there
		}
		answer := strings.TrimSuffix(n.do(step.cmd), "\r\n")
		want, begins := strings.CutSuffix(step.answer, "…")
		if !begins && answer != want || !strings.HasPrefix(answer, want) {
			t.Errorf("%s: got %q, want %q", step.name, answer, step.answer)
		}
		for field, want := range map[string]string{"epoch": step.epoch, "total": step.total} {
			if got := strings.Split(n.do(hash("HGET "+field)), "\r\n")[1]; got != want { // "" for none
				t.Errorf("%s: got the %s %q, want %q", step.name, field, got, want)
			}
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
	s.lookup = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil }
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
	const password = "redis://:secret@fake"
	many := func(answer string, n int) []string { return slices.Repeat([]string{answer}, n) }
	for _, tt := range []struct {
		name    string
		url     string        // redis://fake unless set
		timeout time.Duration // 1 s unless set
		kept    bool          // a connection is there from before
		dials   []string
		answers []string
		took    time.Duration
		dialed  int
		err     string // its end; empty for none
	}{
		{name: "an answer", dialed: 1},
		{name: "an answer over the kept one", kept: true},
		{name: "kept, closed", kept: true, answers: many(closed, 1), dialed: 1},
		{name: "kept, dead in silence", kept: true, answers: many(silent, 1), took: minSilence, dialed: 1},
		{name: "kept, dead in silence, then another", kept: true, answers: many(silent, 2), took: 2*minSilence + minPause, dialed: 2},
		{name: "one of them, with less time", timeout: 300 * time.Millisecond, kept: true, answers: many(silent, 1), took: 150 * time.Millisecond, dialed: 1},
		{name: "an error reply", answers: many("-LOADING\r\n", 1), took: minPause, dialed: 2},
		{name: "a malformed reply", answers: many(":12a\r\n", 1), took: minPause, dialed: 2},
		{name: "an error reply to AUTH", url: password, answers: []string{"-WRONGPASS\r\n", "+OK\r\n"}, took: minPause, dialed: 2},
		{name: "a host that is silent", timeout: 5 * time.Second, dials: many(silent, 1), took: maxSilence + minPause, dialed: 2},
		{name: "refused for 950 ms", dials: many(closed, 12), took: 950 * time.Millisecond, dialed: 13},
		{name: "an unknown script", answers: many("-NOSCRIPT No matching script.\r\n", 1), dialed: 1},
		{name: "MOVED", answers: many("-MOVED 866 node:1\r\n", 1), dialed: 2},
		{name: "MOVED to nobody", dials: []string{"+OK\r\n", closed}, answers: many("-MOVED 866 node:1\r\n", 1), took: minPause, dialed: 3},
		{name: "another epoch", answers: many("-"+string(errLost)+"\r\n", 1), dialed: 1, err: string(errLost)},
		{name: "refused for good", dials: many(closed, 20), took: 1050 * time.Millisecond, dialed: 14,
			err: "fake:6379: connection refused"},
		{name: "silent for good", answers: many(silent, 20), took: 1832500 * time.Microsecond, dialed: 5,
			err: "fake:6379: read pipe: i/o timeout"},
		{name: "closed for good", answers: many(closed, 20), took: 1050 * time.Millisecond, dialed: 14, err: "fake:6379: EOF"},
		{name: "a word for a reply, for good", answers: many("secret\r\n", 20), took: 1050 * time.Millisecond, dialed: 14,
			err: "fake:6379: reply of kind 's': want ':'"},
		{name: "an error after MOVED, for good", answers: slices.Repeat([]string{"-MOVED 1 node:6380\r\n", "-ERR no\r\n"}, 20),
			took: 1050 * time.Millisecond, dialed: 28, err: "node:6380: ERR no"},
		{name: "no AUTH", url: password, took: 1050 * time.Millisecond, dialed: 14,
			answers: many("-ERR unknown command 'AUTH', with args beginning with: 'secret'\r\n", 20),
			err:     "fake:6379: AUTH: ERR unknown command 'AUTH'"},
		{name: "an echo of AUTH", url: password, took: 1050 * time.Millisecond, dialed: 14,
			answers: many(string(encode("AUTH", "secret")), 20),
			err:     "fake:6379: AUTH: reply of kind '*': want '+'"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &scripted{}
				server := fakeRedis(s.answer).server(t, cmp.Or(tt.url, "redis://fake"))
				server.timeout = cmp.Or(tt.timeout, time.Second)
				c := &conn{server: server, key: "k", id: "host:1/X/1"}
				defer func() { c.close() }()
				if tt.kept {
					c.raise("e", 0, 1)
				}
				s.dials, s.answers, s.addrs = tt.dials, tt.answers, nil
				began := time.Now()
				n, err := c.raise("e", 1, 2)
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
			"-MOVED 866 fd00::2:6379\r\n", ":2\r\n", "-MOVED 866 ?:1\r\n", ":3\r\n",
			"-LOADING\r\n", "-MOVED 866 ?:1\r\n"}}
		c := &conn{server: fakeRedis(s.answer).server(t, "redis://fake"), key: "k", id: "host:1/X/1"}
		defer func() { c.close() }()
		for i := range int64(4) {
			if _, err := c.raise("e", i, i+1); err != nil {
				t.Error(err)
			}
		}
		if want := []string{"EVALSHA", "EVAL", "EVALSHA", "EVALSHA"}; !slices.Equal(s.sent[:4], want) {
			t.Errorf("got the commands %q, want first %q", s.sent, want)
		}
		if want := []string{"fake:6379", "[fd00::2]:6379", "[fd00::2]:1", "fake:6379", "fake:1"}; !slices.Equal(s.addrs, want) {
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
		"MOVED 3999 nonsense":          "asked:nonsense",
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
				conns[i] = &conn{server: server, key: "k", id: fmt.Sprint("host:1/X/", i)}
				defer func() { conns[i].close() }()
			}
			for _, c := range conns[:4] {
				c.raise("e", 0, 1)
			}
			s.dials, s.answers = tt.dials, tt.answers
			for i := range 10 {
				conns[i%5].raise("e", 0, 1)
			}
			if len(s.addrs) != tt.want {
				t.Errorf("%s: got %d dials of 5 connections, want %d", tt.name, len(s.addrs), tt.want)
			}
		})
	}
}

// A Redis that is far away, or slow for a while, has more than 250 ms over a kept connection: only
// the first command over it is sent again.
func TestSlowRedis(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, slow := &scripted{}, time.Duration(0)
		server := fakeRedis(func(cmd []string) string {
			time.Sleep(slow)
			return s.answer(cmd)
		}).server(t, "redis://fake")
		server.timeout = 5 * time.Second
		c := &conn{server: server, key: "k", id: "host:1/X/1"}
		defer func() { c.close() }()
		for i, step := range []struct {
			slow, took time.Duration
			dialed     int
		}{
			{0, 0, 1},
			{300 * time.Millisecond, minSilence + 600*time.Millisecond, 2}, // the dial takes as long
			{300 * time.Millisecond, 300 * time.Millisecond, 2},
			{500 * time.Millisecond, 500 * time.Millisecond, 2},
			{0, 0, 2},
			{300 * time.Millisecond, minSilence + 600*time.Millisecond, 3}, // it was quick meanwhile
		} {
			slow = step.slow
			began := time.Now()
			_, err := c.raise("e", 0, 1)
			if took := time.Since(began); err != nil || took != step.took || len(s.addrs) != step.dialed {
				t.Errorf("command %d: got %v after %v and %d dials, want %v and %d", i, err, took, len(s.addrs), step.took, step.dialed)
			}
		}
	})
}

// Where a host has several addresses, each has its part of the time of a dial.
func TestAddresses(t *testing.T) {
	for _, tt := range []struct {
		dials []string // what comes of each
		took  time.Duration
		addrs string
	}{
		{[]string{"+OK\r\n"}, 0, "1:6379"},
		{[]string{closed, "+OK\r\n"}, 0, "1:6379 2:6379"},
		{[]string{silent, "+OK\r\n"}, maxSilence / 3, "1:6379 2:6379"},
		{[]string{silent, silent, "+OK\r\n"}, maxSilence * 2 / 3, "1:6379 2:6379 3:6379"},
		{[]string{closed, silent, "+OK\r\n"}, maxSilence / 2, "1:6379 2:6379 3:6379"},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := &scripted{dials: tt.dials}
			server := fakeRedis(s.answer).server(t, "redis://fake")
			server.timeout = 5 * time.Second
			server.lookup = func(_ context.Context, host string) ([]string, error) { return []string{"1", "2", "3"}, nil }
			c := &conn{server: server, key: "k", id: "host:1/X/1"}
			defer func() { c.close() }()
			began := time.Now()
			_, err := c.raise("e", 0, 1)
			took := time.Since(began).Round(time.Millisecond)
			if got := strings.Join(s.addrs, " "); err != nil || took != tt.took.Round(time.Millisecond) || got != tt.addrs {
				t.Errorf("got %v after %v, dialed %s; want %v and %s", err, took, got, tt.took, tt.addrs)
			}
		})
	}
}

// A ledger is restored in commands of a thousand entries each. What is no entry is passed over.
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
		c := &conn{key: n.key, server: fakeRedis(func(cmd []string) string {
			s.answer(cmd)
			if len(cmd) > 7+3*chunk {
				t.Errorf("got a command of %d words", len(cmd))
			}
			return n.answer(cmd)
		}).server(t, "redis://fake")}
		defer func() { c.close() }()
		c.restore("", 0, nil) // begins an epoch, and Redis knows the script then
		begun, err := c.read()
		s.sent = nil
		total, restoreErr := c.restore(begun.epoch, 0, lacking)
		if want := int64(size * (size + 1) / 2); total != want || len(s.sent) != 3 || err != nil || restoreErr != nil {
			t.Errorf("got the total %d, %d commands, %v, %v; want %d and 3", total, len(s.sent), err, restoreErr, want)
		}
		n.do([]string{"HSET", n.key, "odd", "x", "odder", "5 x", "long", strings.Repeat("5", 5000)})
		if err := c.markOpen(begun.epoch); err != nil {
			t.Error(err)
		}
		want := ledger{begun.epoch, begun.epoch, total, lacking}
		if got, err := c.read(); !reflect.DeepEqual(got, want) || err != nil {
			t.Errorf("got %d entries of %d, %v; want them as they were", len(got.entries), got.total, err)
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
		s.lookup = func(context.Context, string) ([]string, error) { return []string{"127.0.0.1"}, nil }
		s.dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, m.Addr())
		}
		c := &conn{server: s, addr: tt.dialed, deadline: time.Now().Add(10 * time.Second)}
		_, err := c.roundTrip(':', "INCRBY", "k", "1")
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
		c := &conn{server: mustParse(t, tt.url, 200*time.Millisecond)}
		_, err := c.try(':', "INCRBY", "k", "1")
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
