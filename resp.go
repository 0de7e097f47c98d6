package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha1"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	maxString   = 1 << 20                // longest string accepted; one of an entry is below 1 KiB
	dialTimeout = time.Second            // to connect: a host that is gone does not answer at all
	minPause    = 10 * time.Millisecond  // first between two attempts; it doubles with each
	maxPause    = 100 * time.Millisecond // longest
	chunk       = 1000                   // entries in a command, so that Redis is not held up for long
)

// encode returns a command as RESP has it, an array of bulk strings,
// https://redis.io/docs/latest/develop/reference/protocol-spec/#arrays.
func encode(args ...string) []byte {
	b := fmt.Appendf(nil, "*%d\r\n", len(args))
	for _, arg := range args {
		b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(arg), arg)
	}
	return b
}

// A redisError is an error reply without its leading '-'; its first word is a code,
// https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors.
type redisError string

func (e redisError) Error() string { return string(e) }

// isCode reports whether err is an error reply whose first word is code.
func isCode(err error, code string) bool {
	var reply redisError
	return errors.As(err, &reply) && strings.HasPrefix(string(reply), code+" ")
}

// A reply is what Redis answers; its kind says which field is set.
type reply struct {
	n    int64    // ':', an integer
	text string   // '+' or '$', a simple or a bulk string
	list []string // '*', an array of bulk strings
}

// readReply reads a reply of the given kind. An error reply comes back as a redisError. Other
// errors quote no text: a server that echoes AUTH would put the password into the log.
func readReply(r *bufio.Reader, kind byte) (got reply, err error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return got, err
	}
	text, ok := strings.CutSuffix(string(line), "\r\n")
	if !ok || text == "" {
		return got, fmt.Errorf("malformed reply line of %d bytes", len(line))
	}
	first, text := text[0], text[1:]
	if first == '-' {
		text, _, _ = strings.Cut(text, ", with args") // of an unknown command: AUTH's are secret
		return got, redisError(text)
	}
	if first != kind {
		return got, fmt.Errorf("reply of kind %q: want %q", first, kind)
	}
	if kind == '+' {
		return reply{text: text}, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || kind == '$' && (n < 0 || n > maxString) {
		return got, fmt.Errorf("malformed reply of kind %q", kind)
	}
	switch kind {
	case '$':
		b := make([]byte, n+2)
		_, err = io.ReadFull(r, b)
		return reply{text: string(b[:n])}, err
	case '*':
		for ; n > 0 && err == nil; n-- {
			var part reply
			part, err = readReply(r, '$')
			got.list = append(got.list, part.text)
		}
		return got, err
	}
	return reply{n: n}, nil
}

// A redisServer says how to reach Redis, and holds the state that all connections share.
type redisServer struct {
	addr    string        // host:port
	greet   [][]string    // sent after each dial: AUTH, secret, and SELECT, each only where needed
	tls     *tls.Config   // nil for none
	timeout time.Duration // after it a command gets one last attempt
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)

	generation atomic.Int64 // grows when a kept connection fails; older ones are dialed anew
	down       atomic.Bool  // Redis is down: the next attempt of a command is its last
}

// dialAlone dials as net.Dialer does, with a resolver of its own. A shared one merges lookups, and
// one lost packet then holds up all connections: for 5 s, unless resolv.conf says otherwise.
func dialAlone(ctx context.Context, network, addr string) (net.Conn, error) {
	return (&net.Dialer{Resolver: new(net.Resolver)}).DialContext(ctx, network, addr)
}

// parseRedisURL reads REDIS_URL. Its errors quote nothing but the scheme: any other part may hold a
// password.
func parseRedisURL(rawURL string, timeout time.Duration) (*redisServer, error) {
	const form = "redis://[[user]:password@]host[:port][/db]"
	u, err := url.Parse(rawURL)
	if err != nil || u.Scheme == "" || u.Opaque != "" {
		return nil, errors.New("malformed URL: want " + form +
			", with %XX for special characters of the password")
	}
	port, db := cmp.Or(u.Port(), "6379"), cmp.Or(strings.TrimPrefix(u.Path, "/"), "0")
	portNumber, portErr := strconv.ParseUint(port, 10, 16)
	dbNumber, dbErr := strconv.ParseUint(db, 10, 31)
	user := u.User.Username()
	password, hasPassword := u.User.Password()
	s := &redisServer{addr: net.JoinHostPort(u.Hostname(), port), timeout: timeout, dial: dialAlone}
	switch u.Scheme {
	case "redis", "valkey":
	case "rediss", "valkeys":
		s.tls = &tls.Config{ServerName: u.Hostname()}
	default:
		return nil, fmt.Errorf("unknown scheme %q: want redis or rediss", u.Scheme)
	}
	switch {
	case u.RawQuery != "" || u.ForceQuery || strings.Contains(rawURL, "#"):
		return nil, errors.New("query or fragment: want none; a password has %3F for ? and %23 for #")
	case u.Hostname() == "":
		return nil, errors.New("missing host: want " + form)
	case portErr != nil || portNumber == 0 || strings.HasSuffix(u.Host, ":") ||
		u.Host[0] != '[' && strings.Count(u.Host, ":") > 1:
		return nil, errors.New("invalid port: want 1 to 65535, and an IPv6 address in brackets")
	case dbErr != nil:
		return nil, errors.New("invalid database: want a number, such as /3; a password has %2F for /")
	case user != "" && !hasPassword:
		return nil, errors.New("user without a password: want user:password@, " +
			"or :password@ for a password alone")
	case user != "":
		s.greet = append(s.greet, []string{"AUTH", user, password})
	case password != "":
		s.greet = append(s.greet, []string{"AUTH", password})
	}
	if dbNumber != 0 {
		s.greet = append(s.greet, []string{"SELECT", strconv.FormatUint(dbNumber, 10)})
	}
	return s, nil
}

// String returns the address, for the log.
func (s *redisServer) String() string {
	if s == nil {
		return "none: a cluster of one"
	}
	return s.addr
}

// errBehind is what the script returns where Redis has lost data.
const errBehind = redisError("BEHIND the total is lower than its client knows")

// script raises entries of the ledger, each to a count, and the total by the differences. Sent
// again, or late, it changes nothing. It returns the total that the last entry reached. It stores
// that in the entry, so the same command returns it again. Without entries it returns the total.
//
// ARGV[1] is the total that the sender knows, or empty. If Redis has less, the script does nothing
// and returns errBehind. Then each entry has three arguments: its id, its count, and the total that
// it reached. The last one is empty for new requests: the script finds it.
//
// The writes are in an order in which a refused one counts nothing. INCRBY by 0 fails first where
// Redis refuses all, as a replica does. HSET comes before the INCRBY that counts. Numbers are
// written with %d, exact here to 2^53, as Lua gives some a form that INCRBY refuses (1e+08,
// https://github.com/redis/redis/pull/13115).
const script = `local total, known = redis.call('INCRBY', KEYS[1], 0), tonumber(ARGV[1])
if known and total < known then
	return redis.error_reply('` + string(errBehind) + `')
elseif total > 2^53 then
	return redis.error_reply('ERR the total is beyond 2^53, to which numbers are exact')
end
local reached = total
for i = 2, #ARGV, 3 do
	local id, count = ARGV[i], tonumber(ARGV[i + 1])
	local value = redis.call('HGET', KEYS[2], id) or '0 0'
	local oldCount, oldReached = string.match(value, '^(%d+) (-?%d+)$')
	if not oldCount then
		return redis.error_reply('ERR the ledger has no count at ' .. id .. ': ' .. value)
	end
	reached = tonumber(oldReached)
	if tonumber(oldCount) < count then
		total = total + (count - oldCount)
		reached = tonumber(ARGV[i + 2]) or total
		redis.call('HSET', KEYS[2], id, string.format('%d %d', count, reached))
		redis.call('INCRBY', KEYS[1], string.format('%d', count - oldCount))
	end
end
return reached`

// scriptSHA names the script to EVALSHA, https://redis.io/docs/latest/commands/evalsha/.
var scriptSHA = fmt.Sprintf("%x", sha1.Sum([]byte(script)))

// An entry of the ledger is how far a connection has counted.
type entry struct {
	count   int64 // requests
	reached int64 // the total that it reached by that; 0 where that is not known
}

// A conn is a connection to Redis, for one goroutine at a time. It outlives its TCP
// connections: one is dialed when first needed and again after each failure.
type conn struct {
	server              *redisServer
	totalKey, ledgerKey string
	id                  string // of its entry in the ledger

	addr       string   // last dialed
	nc         net.Conn // nil while there is none
	r          *bufio.Reader
	generation int64 // of the server when nc was dialed
}

// newConn returns a connection for an entry in the ledger of key. The braces put both keys into one
// slot of a Redis Cluster,
// https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags.
func newConn(s *redisServer, key, id string) *conn {
	return &conn{server: s, id: id, totalKey: key, ledgerKey: "{" + key + "}:ledger"}
}

// raise raises the connection's entry to a count and returns the total that this reached.
// Where the total is lower than known it does nothing and returns errBehind. After another
// error nobody knows whether Redis did it.
func (c *conn) raise(known, count int64) (total int64, err error) {
	return c.eval(strconv.FormatInt(known, 10), c.id, strconv.FormatInt(count, 10), "")
}

// restore puts entries back that Redis lacks.
func (c *conn) restore(lacking map[string]entry) error {
	var args []string
	for id, e := range lacking {
		args = append(args, id, strconv.FormatInt(e.count, 10), strconv.FormatInt(e.reached, 10))
	}
	for some := range slices.Chunk(args, 3*chunk) {
		if _, err := c.eval(append([]string{""}, some...)...); err != nil {
			return err
		}
	}
	return nil
}

// total returns the total. It writes, an INCRBY by 0, so it fails wherever counting would.
func (c *conn) total() (int64, error) { return c.eval("") }

// eval has Redis run the script.
func (c *conn) eval(args ...string) (int64, error) {
	args = append([]string{"EVALSHA", scriptSHA, "2", c.totalKey, c.ledgerKey}, args...)
	got, err := c.try(':', args...)
	if isCode(err, "NOSCRIPT") {
		args[0], args[1] = "EVAL", script
		got, err = c.try(':', args...)
	}
	return got.n, err
}

// entries returns the ledger. It skips fields that hold no entry.
func (c *conn) entries() (map[string]entry, error) {
	got, err := c.try('*', "HGETALL", c.ledgerKey)
	entries := make(map[string]entry, len(got.list)/2)
	for i := 0; i+1 < len(got.list); i += 2 {
		count, reached, _ := strings.Cut(got.list[i+1], " ")
		n, err1 := strconv.ParseInt(count, 10, 64)
		total, err2 := strconv.ParseInt(reached, 10, 64)
		if err1 == nil && err2 == nil {
			entries[got.list[i]] = entry{n, total}
		}
	}
	return entries, err
}

// try sends a command until it succeeds or the server's timeout is over, and then once more. Each
// attempt ends after half of that timeout. The first one uses the TCP connection that was kept, if
// there is one. All others dial a fresh one, and so does the last, since a kept one may be dead
// without a sign. An error names the address that was tried.
func (c *conn) try(kind byte, args ...string) (got reply, err error) {
	end := time.Now().Add(c.server.timeout)
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		if c.generation != c.server.generation.Load() {
			c.close()
		}
		kept := c.nc != nil
		last := c.server.down.Load() || !time.Now().Before(end)
		deadline := time.Now().Add(c.server.timeout / 2)
		got, err = c.attempt(c.server.addr, deadline, kind, args...)
		if isCode(err, "MOVED") {
			moved := movedAddr(err.Error(), c.addr)
			c.close()
			got, err = c.attempt(moved, deadline, kind, args...)
		}
		if err == nil || errors.Is(err, errBehind) || isCode(err, "NOSCRIPT") {
			return got, err
		}
		c.close()
		if kept && !errors.As(err, new(redisError)) { // the others that were kept may be dead, too
			c.server.generation.CompareAndSwap(c.generation, c.generation+1)
		}
		if kept {
			continue // at once, over a fresh one
		}
		if last {
			return got, fmt.Errorf("%s: %w", c.addr, err)
		}
		time.Sleep(pause)
	}
}

// attempt sends a command and reads its reply. Where there is no TCP connection it dials addr.
func (c *conn) attempt(addr string, deadline time.Time, kind byte, args ...string) (reply, error) {
	if c.nc == nil {
		if err := c.dial(addr, deadline); err != nil {
			return reply{}, err
		}
	}
	c.nc.SetDeadline(deadline)
	if _, err := c.nc.Write(encode(args...)); err != nil {
		return reply{}, err
	}
	return readReply(c.r, kind)
}

// movedAddr returns the address in "MOVED slot host:port", where an IPv6 host has no brackets, and
// an empty one or a question mark means the node that said it,
// https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#moved-redirection.
func movedAddr(reply, from string) string {
	addr := reply[strings.LastIndexByte(reply, ' ')+1:]
	colon := max(strings.LastIndexByte(addr, ':'), 0)
	host, port := strings.Trim(addr[:colon], "[]?"), strings.TrimPrefix(addr[colon:], ":")
	if host == "" {
		host, _, _ = net.SplitHostPort(from)
	}
	return net.JoinHostPort(host, port)
}

// dial connects to addr and sends the server's greeting.
func (c *conn) dial(addr string, deadline time.Time) error {
	c.addr, c.generation = addr, c.server.generation.Load()
	ctx, cancel := context.WithTimeout(context.Background(), min(dialTimeout, time.Until(deadline)))
	defer cancel()
	nc, err := c.server.dial(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	if c.server.tls != nil {
		// The certificate must be for addr's host, or for REDIS_URL's where MOVED named a bare IP.
		cfg := c.server.tls.Clone()
		if host, _, _ := net.SplitHostPort(addr); net.ParseIP(host) == nil {
			cfg.ServerName = host
		}
		nc = tls.Client(nc, cfg)
	}
	c.nc, c.r = nc, bufio.NewReader(nc)
	for _, args := range c.server.greet {
		if _, err := c.attempt(addr, deadline, '+', args...); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
	}
	return nil
}

// close closes the TCP connection, if there is one.
func (c *conn) close() {
	if c.nc != nil {
		c.nc.Close()
	}
	c.nc = nil
}
