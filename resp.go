package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	beat       = time.Second            // between two heartbeats while Redis answers
	beatDown   = 100 * time.Millisecond // the same, and between two attempts, while Redis is down
	retryPause = 10 * time.Millisecond  // between two attempts of a flight while Redis is up: a restart takes some 100 ms
	maxLine    = 4 << 10                // bytes of the longest reply line accepted; Redis' own are below 1 KiB
)

// script raises an instance's entry in the ledger to the count given and the
// total by the difference. It answers the total that the entry was raised to,
// so that the same command, sent again, gets the same answer.
//
// The sender says which entry it expects, and the difference to that: to
// compare is cheaper than to parse, and it is off only after a failure. Where
// nothing is new, as in a heartbeat, the expected entry gets the total of the
// moment.
//
// Numbers are written with %d, which is exact here to 2^53, because Redis
// writes some Lua numbers in a form that INCRBY refuses (1e+08,
// https://github.com/redis/redis/pull/13115).
const script = `local entry, added = redis.call('HGET', KEYS[2], ARGV[1]), ARGV[3]
if entry ~= ARGV[4] then
	local count, total = string.match(entry or '0 0', '(%d+) (%d+)')
	if entry and tonumber(count) >= tonumber(ARGV[2]) then
		return tonumber(total)
	end
	added = string.format('%d', ARGV[2] - count)
end
local total = redis.call('INCRBY', KEYS[1], added)
redis.call('HSET', KEYS[2], ARGV[1], string.format('%s %d', ARGV[2], total))
return total`

// scriptSHA names the script to EVALSHA, https://redis.io/docs/latest/commands/evalsha/.
var scriptSHA = func() string {
	sum := sha1.Sum([]byte(script))
	return hex.EncodeToString(sum[:])
}()

// A counter numbers the requests of this instance and, through Redis, those of
// the cluster: each exactly once, by the script's ledger.
type counter struct {
	id     string // this process in the ledger
	key    string // the total's
	ledger string // the key of a hash from id to "count total", in the total's cluster slot
	redis  *redis // nil for a cluster of one

	// pool holds the connection. Taking it out is the right to fly. There is
	// one only: two flights at once could land in the wrong order, and the
	// earlier one's numbers would then be unknown.
	pool chan *conn
	last *flight // the last one that Redis answered; for who holds the connection

	mu        sync.Mutex
	n         int64   // requests handled: those of every flight cut so far
	gathering *flight // takes the requests that arrive now
	cluster   int64   // the total as last seen
	answered  bool    // Redis has answered once
	down      error   // why Redis is down; nil while it answers
}

// A flight is the requests that share one command to Redis.
type flight struct {
	size int64 // requests in it; grows until the flight is cut

	done  chan struct{} // closed once the fields below are set
	n     int64         // the instance's number of its last request
	total int64         // the cluster's number of its last request, unless err
	err   error
}

func newFlight() *flight { return &flight{done: make(chan struct{})} }

// entry returns what the ledger holds after f: "count total".
func (f *flight) entry() string {
	return strconv.FormatInt(f.n, 10) + " " + strconv.FormatInt(f.total, 10)
}

// newCounter returns a counter for the named instance that keeps its total in
// r at key, or counts alone if r is nil.
func newCounter(instance, key string, r *redis) *counter {
	c := &counter{
		id:        instance + "/" + rand.Text(), // a restarted process is another one
		key:       key,
		ledger:    "{" + key + "}:instances",
		redis:     r,
		pool:      make(chan *conn, 1),
		last:      newFlight(),
		gathering: newFlight(),
	}
	if r != nil {
		c.pool <- &conn{redis: r, addr: r.addr}
	}
	return c
}

// next counts a request and returns its number in this instance and in the
// cluster. With an error the cluster's number is unknown; the request is
// counted all the same, by the next command that Redis answers.
func (c *counter) next() (instance, cluster int64, err error) {
	c.mu.Lock()
	if c.redis == nil || c.down != nil {
		defer c.mu.Unlock()
		c.n++
		return c.n, c.n, c.down
	}
	f := c.gathering
	f.size++
	place := f.size
	c.mu.Unlock()

	if place == 1 {
		c.lead(f)
	}
	<-f.done
	behind := f.size - place
	return f.n - behind, f.total - behind, f.err
}

// lead flies f once the connection is free, unless Redis goes down before.
func (c *counter) lead(f *flight) {
	select {
	case conn := <-c.pool:
		if c.last.size > 1 {
			runtime.Gosched() // let handlers that are ready to run join the flight
		}
		c.fly(conn, f)
		c.pool <- conn
	case <-f.done:
	}
}

// heartbeat flies an empty flight: it restores what Redis has lost and sees
// whether Redis answers.
func (c *counter) heartbeat() {
	conn := <-c.pool
	c.fly(conn, newFlight())
	c.pool <- conn
}

// fly cuts f, sends the instance's count to Redis and hands out the numbers.
func (c *counter) fly(conn *conn, f *flight) {
	c.mu.Lock()
	if f.err != nil { // failed while its leader waited
		c.mu.Unlock()
		return
	}
	c.cut(f)
	down := c.down != nil
	c.mu.Unlock()

	total, err := conn.ask(down, "EVALSHA", scriptSHA, "2", c.key, c.ledger, c.id,
		strconv.FormatInt(f.n, 10), strconv.FormatInt(f.n-c.last.n, 10), c.last.entry())

	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.fail(f, err)
		return
	}
	if c.down != nil || !c.answered {
		slog.Info("Redis is up", "redis", c.redis.addr)
	}
	c.answered, c.down, c.cluster = true, nil, total
	f.total = total
	c.last = f
	close(f.done)
}

// cut closes f to further requests and counts those in it. The caller holds mu.
func (c *counter) cut(f *flight) {
	if f == c.gathering {
		c.gathering = newFlight()
	}
	c.n += f.size
	f.n = c.n
}

// fail marks Redis as down and ends f, which has been cut, and whatever has
// gathered behind it, which would only wait for the next failure. The caller
// holds mu.
func (c *counter) fail(f *flight, err error) {
	if c.down == nil {
		slog.Warn("Redis is down", "redis", c.redis.addr, "cause", err)
	}
	c.down = err
	waiting := c.gathering
	c.cut(waiting)
	for _, f := range []*flight{f, waiting} {
		f.err = err
		close(f.done)
	}
}

// run keeps in touch with Redis until ctx is done, then counts what is left
// and strikes this instance from the ledger; its count stays in the total.
func (c *counter) run(ctx context.Context) {
	if c.redis == nil {
		return
	}
	for ctx.Err() == nil {
		c.heartbeat()
		pause := beat
		if !c.stats().up {
			pause = beatDown
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
	c.heartbeat()
	if !c.stats().up {
		slog.Warn("Redis may lack this instance's last requests")
		return
	}
	conn := <-c.pool
	if _, err := conn.ask(false, "HDEL", c.ledger, c.id); err != nil {
		slog.Warn("the ledger keeps this instance's entry", "id", c.id, "cause", err)
	}
	conn.drop()
}

// ready returns nil once Redis has answered, and before that the reason why not.
func (c *counter) ready() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.redis == nil || c.answered:
		return nil
	case c.down != nil:
		return c.down
	}
	return errors.New("no answer from Redis yet")
}

type stats struct {
	instance int64 // requests handled here
	cluster  int64 // requests handled by all, as last seen
	up       bool  // Redis answered the last flight
}

func (c *counter) stats() stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.redis == nil {
		return stats{c.n, c.n, false}
	}
	return stats{c.n, c.cluster, c.answered && c.down == nil}
}

// redis says how to reach a Redis server.
type redis struct {
	addr    string        // host:port
	auth    []string      // AUTH's arguments, secret; nil for none
	db      int           // for SELECT
	tls     *tls.Config   // nil for none
	timeout time.Duration // for a command with all its attempts
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)
}

// parseRedisURL reads redis://[[user]:password@]host[:port][/db], or rediss://
// for TLS. Its errors say what would be right and never quote the URL, which
// may hold a password.
func parseRedisURL(raw string) (*redis, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return nil, errors.New("not a URL")
	}
	r := &redis{dial: new(net.Dialer).DialContext}
	switch u.Scheme {
	case "redis":
	case "rediss":
		r.tls = &tls.Config{ServerName: u.Hostname()}
	default:
		return nil, errors.New("its scheme is neither redis nor rediss")
	}
	if u.RawQuery != "" || u.ForceQuery || strings.Contains(raw, "#") {
		return nil, errors.New("'?' and '#' have no meaning here; in a password write %3F and %23")
	}
	if u.Hostname() == "" {
		return nil, errors.New("it names no host")
	}
	port := u.Port()
	if port == "" {
		port = "6379"
	}
	if p, err := strconv.ParseUint(port, 10, 16); err != nil || p == 0 || strings.HasSuffix(u.Host, ":") {
		return nil, errors.New("its port is not a number from 1 to 65535")
	}
	r.addr = net.JoinHostPort(u.Hostname(), port)
	if path := strings.TrimPrefix(u.Path, "/"); path != "" {
		db, err := strconv.ParseUint(path, 10, 31)
		if err != nil {
			return nil, errors.New("its path is not the number of a database")
		}
		r.db = int(db)
	}
	user := u.User.Username()
	switch password, set := u.User.Password(); {
	case user != "" && !set:
		return nil, errors.New("it has a user without a password; a password alone is written :password@")
	case user != "":
		r.auth = []string{user, password}
	case password != "":
		r.auth = []string{password}
	}
	return r, nil
}

// A conn is a connection to Redis that is dialed when it is first needed, and
// anew after each failure.
type conn struct {
	redis *redis
	addr  string   // redis.addr, or where MOVED pointed to
	net   net.Conn // nil while there is none
	r     *bufio.Reader
	buf   []byte
}

// ask sends a command, which must be idempotent since it may be sent again,
// and returns the integer that Redis replies. It tries until redis.timeout is
// over; an error reply that time will not mend ends it at once.
//
// While Redis is up, an attempt has half of the time that is left: a
// connection that has gone dead in silence leaves the other half to a fresh
// one. While it is down, each attempt is a fresh one and may take its time.
func (c *conn) ask(down bool, cmd ...string) (int64, error) {
	deadline := time.Now().Add(c.redis.timeout)
	for {
		now := time.Now()
		limit, pause := now.Add(deadline.Sub(now)/2), retryPause
		if down {
			limit, pause = deadline, beatDown
		}
		n, err := c.try(limit, cmd)
		if err == nil {
			return n, nil
		}
		c.drop()
		if !c.passing(err) || time.Until(deadline) <= pause {
			return 0, err
		}
		time.Sleep(pause)
	}
}

// try sends a command once and reads its reply.
func (c *conn) try(limit time.Time, cmd []string) (int64, error) {
	if c.net == nil {
		if err := c.connect(limit); err != nil {
			return 0, err
		}
	}
	c.net.SetDeadline(limit)
	c.buf = appendCommand(c.buf[:0], cmd...)
	if _, err := c.net.Write(c.buf); err != nil {
		return 0, err
	}
	return readInt(c.r)
}

// connect dials Redis and shakes hands: AUTH, SELECT and SCRIPT LOAD in one write.
func (c *conn) connect(limit time.Time) error {
	ctx, cancel := context.WithDeadline(context.Background(), limit)
	defer cancel()
	nc, err := c.redis.dial(ctx, "tcp", c.addr)
	if err != nil {
		c.addr = c.redis.addr // where MOVED pointed to may be gone
		return err
	}
	c.net = nc
	c.net.SetDeadline(limit)
	if c.redis.tls != nil {
		c.net = tls.Client(nc, c.redis.tls)
	}
	c.r = bufio.NewReaderSize(c.net, maxLine)

	var hello []byte
	if c.redis.auth != nil {
		hello = appendCommand(hello, append([]string{"AUTH"}, c.redis.auth...)...)
	}
	if c.redis.db != 0 { // Redis Cluster knows no SELECT
		hello = appendCommand(hello, "SELECT", strconv.Itoa(c.redis.db))
	}
	hello = appendCommand(hello, "SCRIPT", "LOAD", script)
	if _, err := c.net.Write(hello); err != nil {
		return err
	}
	if c.redis.auth != nil {
		if err := expect(c.r, "+OK"); err != nil {
			// Redis may quote the arguments of a command that it does not know.
			said, _, _ := strings.Cut(err.Error(), ", with args")
			return replyError(said)
		}
	}
	if c.redis.db != 0 {
		if err := expect(c.r, "+OK"); err != nil {
			return err
		}
	}
	return expect(c.r, "$40", scriptSHA)
}

// drop closes the connection, if there is one, without leaving a command in
// the kernel's buffers that could still be delivered.
func (c *conn) drop() {
	if c.net == nil {
		return
	}
	raw := c.net
	if t, ok := raw.(*tls.Conn); ok {
		raw = t.NetConn()
	}
	if t, ok := raw.(*net.TCPConn); ok {
		t.SetLinger(0)
	}
	raw.Close()
	c.net = nil
}

// A replyError is an error reply of Redis without its leading '-',
// https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors.
type replyError string

func (e replyError) Error() string { return string(e) }

// passingReplies are the first words of the error replies that a fresh
// connection, or a little time, mends: during a failover, a restart, a move of
// the slot to another node (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/),
// and after SCRIPT FLUSH.
var passingReplies = []string{"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "LOADING", "NOSCRIPT"}

// passing reports whether err may be gone on another attempt; whatever broke
// the connection may, but for a certificate that does not fit. After MOVED the
// next attempt goes where it points.
func (c *conn) passing(err error) bool {
	var certificate *tls.CertificateVerificationError
	var reply replyError
	if !errors.As(err, &reply) {
		return !errors.As(err, &certificate)
	}
	words := strings.Fields(string(reply))
	if len(words) == 0 || !slices.Contains(passingReplies, words[0]) {
		return false
	}
	if words[0] == "MOVED" && len(words) == 3 {
		host, port, err := net.SplitHostPort(words[2])
		if err != nil {
			return false
		}
		if host == "" { // the node does not know its own name: it is where we asked
			host, _, _ = net.SplitHostPort(c.addr)
		}
		c.addr = net.JoinHostPort(host, port)
	}
	return true
}

// appendCommand appends a command as RESP has it: an array of bulk strings,
// https://redis.io/docs/latest/develop/reference/protocol-spec/#arrays.
func appendCommand(b []byte, args ...string) []byte {
	b = append(b, '*')
	b = strconv.AppendInt(b, int64(len(args)), 10)
	for _, arg := range args {
		b = append(b, "\r\n$"...)
		b = strconv.AppendInt(b, int64(len(arg)), 10)
		b = append(b, "\r\n"...)
		b = append(b, arg...)
	}
	return append(b, "\r\n"...)
}

// readLine reads a line of a reply without its end, valid until the next read.
// An error reply comes back as a replyError. The line is no longer than r's buffer.
func readLine(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return nil, fmt.Errorf("reply line of more than %d bytes", r.Size())
	}
	if err != nil {
		return nil, err
	}
	line, ok := bytes.CutSuffix(line, []byte("\r\n"))
	if !ok {
		return nil, fmt.Errorf("reply line without a carriage return: %.40q", line)
	}
	if len(line) > 0 && line[0] == '-' {
		return nil, replyError(line[1:])
	}
	return line, nil
}

// readInt reads an integer reply,
// https://redis.io/docs/latest/develop/reference/protocol-spec/#integers.
func readInt(r *bufio.Reader) (int64, error) {
	line, err := readLine(r)
	if err != nil {
		return 0, err
	}
	if len(line) > 0 && line[0] == ':' {
		if n, err := strconv.ParseInt(string(line[1:]), 10, 64); err == nil {
			return n, nil
		}
	}
	return 0, fmt.Errorf("reply %.40q in place of an integer", line)
}

// expect reads the lines of a reply that can only be one.
func expect(r *bufio.Reader, lines ...string) error {
	for _, want := range lines {
		line, err := readLine(r)
		if err != nil {
			return err
		}
		if string(line) != want {
			return fmt.Errorf("reply %.40q in place of %q", line, want)
		}
	}
	return nil
}
