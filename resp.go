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
	"maps"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	maxLine     = 4 << 10                // longest reply line or string accepted, in bytes; Redis' own stay below 1 KiB
	dialTimeout = time.Second            // to connect: a host that has gone is silent
	minPause    = 10 * time.Millisecond  // after the first attempt of a command; doubles with each
	maxPause    = 100 * time.Millisecond // the longest
)

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

// A redisError is an error reply without its leading '-'; its first word is a code,
// https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors.
type redisError string

func (e redisError) Error() string { return string(e) }

// readReply reads a reply: an int64, a string or, if arrays may come, a []string.
// An error reply comes back as a redisError.
func readReply(r *bufio.Reader, arrays bool) (any, error) {
	line, err := r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return nil, fmt.Errorf("reply line longer than %d bytes", r.Size())
	}
	if err != nil {
		return nil, err
	}
	text, ok := strings.CutSuffix(string(line), "\r\n")
	if !ok || text == "" {
		return nil, fmt.Errorf("malformed reply line %.40q", line)
	}
	kind, text := text[0], text[1:]
	n, err := strconv.ParseInt(text, 10, 64)
	switch {
	case kind == '-':
		text, _, _ = strings.Cut(text, ", with args") // of an unknown command, where they may be secret
		return nil, redisError(text)
	case kind == '+':
		return text, nil
	case kind == ':' && err == nil:
		return n, nil
	case kind == '$' && err == nil && n >= 0 && n <= maxLine:
		b := make([]byte, n+2)
		_, err := io.ReadFull(r, b)
		return string(b[:n]), err
	case kind == '*' && err == nil && arrays:
		var all []string
		for ; err == nil && n > 0; n-- {
			var s string
			s, err = read[string](r)
			all = append(all, s)
		}
		return all, err
	}
	return nil, fmt.Errorf("unexpected reply %.40q", line)
}

// read reads a reply that must be a T.
func read[T any](r *bufio.Reader) (reply T, err error) {
	_, arrays := any(reply).([]string)
	got, err := readReply(r, arrays)
	reply, ok := got.(T)
	if err == nil && !ok { // it is not quoted: something that echoes AUTH would tell the password
		err = fmt.Errorf("unexpected reply of type %T: want %T", got, reply)
	}
	return reply, err
}

// A redisServer says how to reach Redis.
type redisServer struct {
	addr    string        // host:port
	hello   [][]string    // sent after each dial: AUTH, secret, and SELECT, each only where needed
	tls     *tls.Config   // nil for none
	timeout time.Duration // for all attempts of a command, or for one exchange of the ended
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)
}

// dialAlone dials as net.Dialer does, with a lookup of its own. Lookups that
// overlap would share one, and all wait where a packet of that was lost: for 5 s,
// unless resolv.conf says otherwise.
func dialAlone(ctx context.Context, network, addr string) (net.Conn, error) {
	return (&net.Dialer{Resolver: new(net.Resolver)}).DialContext(ctx, network, addr)
}

// parseRedisURL reads redis://[[user]:password@]host[:port][/db]. Its errors
// quote nothing but the scheme: any other part may hold a password.
func parseRedisURL(rawURL string, timeout time.Duration) (*redisServer, error) {
	const form = "redis://[[user]:password@]host[:port][/db]"
	u, err := url.Parse(rawURL)
	if err != nil || u.Scheme == "" || u.Opaque != "" {
		return nil, errors.New("malformed URL: want " + form + ", with %XX for special characters of the password")
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
	case portErr != nil || portNumber == 0 || strings.HasSuffix(u.Host, ":") || u.Host[0] != '[' && strings.Count(u.Host, ":") > 1:
		return nil, errors.New("invalid port: want 1 to 65535, and an IPv6 address in brackets")
	case dbErr != nil:
		return nil, errors.New("invalid database: want a number, such as /3; a password has %2F for /")
	case user != "" && !hasPassword:
		return nil, errors.New("user without a password: want user:password@, or :password@ for a password alone")
	case user != "":
		s.hello = append(s.hello, []string{"AUTH", user, password})
	case password != "":
		s.hello = append(s.hello, []string{"AUTH", password})
	}
	if dbNumber != 0 {
		s.hello = append(s.hello, []string{"SELECT", strconv.FormatUint(dbNumber, 10)})
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

// script raises a connection's entry in the ledger to count, and the total by the
// difference. It answers the total that this reached and keeps it in the entry, so
// that the same command, sent again, adds nothing and has the same answer.
//
// The sender says which entry it expects: to compare is cheaper than to parse.
// Numbers are written with %d, exact here to 2^53, because some come out of Lua
// in a form that INCRBY refuses (1e+08, https://github.com/redis/redis/pull/13115).
const script = `local total, ledger, ended = KEYS[1], KEYS[2], KEYS[3]
local id, count, added, expected = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local entry = redis.call('HGET', ledger, id)
if entry ~= expected then
	local old, reached = string.match(entry or '0 0', '(%d+) (%d+)')
	if entry and tonumber(old) >= tonumber(count) then
		return tonumber(reached)
	end
	if not entry and redis.call('HEXISTS', ended, string.match(id, '(.+)/')) == 1 then
		return redis.error_reply('ENDED this command is late: its instance has ended')
	end
	added = string.format('%d', count - old)
end
local reached = redis.call('INCRBY', total, added)
local noted = redis.pcall('HSET', ledger, id, string.format('%s %d', count, reached))
if type(noted) == 'table' then -- refused: all or nothing
	redis.call('INCRBY', total, string.format('%d', -added))
	return noted
end
return reached`

// endScript takes the number of connections of an instance, then instances that
// have ended, each with all that it has counted. It notes that, adds what their
// entries in the ledger lack of it, and removes those. A second time it does
// nothing.
const endScript = `local total, ledger, ended = KEYS[1], KEYS[2], KEYS[3]
redis.call('INCRBY', total, 0) -- where this is refused, nothing is noted
for a = 2, #ARGV, 2 do
	local id, count = ARGV[a], tonumber(ARGV[a + 1])
	if redis.call('HSETNX', ended, id, string.format('%d', count)) == 1 then
		local entries, added = {}, count
		for i = 1, tonumber(ARGV[1]) do
			entries[i] = id .. '/' .. i
			added = added - string.match(redis.call('HGET', ledger, entries[i]) or '0', '%d+')
		end
		redis.call('INCRBY', total, string.format('%d', added))
		redis.call('HDEL', ledger, unpack(entries))
	end
end
return 0`

// scriptSHA names the script to EVALSHA, https://redis.io/docs/latest/commands/evalsha/.
var scriptSHA = fmt.Sprintf("%x", sha1.Sum([]byte(script)))

// A conn is a connection to Redis with an entry of its own in the ledger. It
// outlives its TCP connections: one is dialed when first needed and again after
// each failure.
type conn struct {
	server               *redisServer
	total, ledger, ended string // keys
	entry                string // name of its entry in the ledger
	count                int64  // all that incrBy was asked to add
	noted, reached       int64  // the entry as Redis last answered: a count, and the total that it reached

	addr     string   // server.addr, or where MOVED pointed
	nc       net.Conn // nil while there is none
	r        *bufio.Reader
	buf      []byte
	shared   bool // shareEnded has compared all over nc, and may do less
	answered bool // Redis has answered a command, so the scheme of its URL is right

	wasSilent bool // the last incrBy found nc dead in silence
	outages   int  // counter.outages when this was last used: where that has grown, nc may be dead
}

// newConn returns a connection for an entry in the ledger of key. The braces
// put the keys into one cluster slot,
// https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags.
func newConn(s *redisServer, key, entry string) *conn {
	return &conn{server: s, addr: s.addr, entry: entry,
		total: key, ledger: "{" + key + "}:instances", ended: "{" + key + "}:ended"}
}

// incrBy adds n to the total exactly once and returns the total that this reached.
// It tries until the server's timeout is over or, with once, until a fresh TCP
// connection fails other than by MOVED. After an error nobody knows whether Redis
// has added n; the next call makes sure.
func (c *conn) incrBy(n int64, once bool) (int64, error) {
	c.count += n
	c.wasSilent = false
	half := c.server.timeout / 2
	deadline := time.Now().Add(c.server.timeout)
	var cause error
	late := false
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		kept := c.nc != nil
		limit := time.Now().Add(min(half, time.Until(deadline))) // if nc has died in silence, time is left for a fresh one
		reached, err := c.raise(limit)
		if err == nil {
			return reached, nil
		}
		if cause == nil || isCode(cause, "MOVED") || !isTimeout(err) {
			cause = err // the last attempt may just have lacked time
		}
		if !late && time.Since(limit) > maxPause { // the process was suspended: time for one more attempt
			late, deadline = true, time.Now().Add(half)
		}
		if kept {
			c.wasSilent = isTimeout(err)
			continue
		}
		if once && !isCode(err, "MOVED") || time.Until(deadline) <= pause {
			return 0, cause
		}
		time.Sleep(pause)
	}
}

// raise raises the ledger's entry to count, in one attempt.
func (c *conn) raise(deadline time.Time) (int64, error) {
	reached, err := do[int64](c, deadline, "EVALSHA", scriptSHA, "3", c.total, c.ledger, c.ended, c.entry,
		fmt.Sprint(c.count), fmt.Sprint(c.count-c.noted), fmt.Sprintf("%d %d", c.noted, c.reached))
	if err == nil {
		c.noted, c.reached = c.count, reached
	}
	return reached, err
}

// shareEnded adds to known the instances that Redis has as ended, tells Redis of those
// in known that Redis lacked, and returns how many these were. Over the same TCP
// connection as before it does so only where Redis has another number of them, or
// lacks one of known taken at random, as after a FLUSHALL.
func (c *conn) shareEnded(known map[string]string) (lacked int, err error) {
	deadline := time.Now().Add(c.server.timeout)
	if c.shared {
		var id string
		for id = range known {
			break
		}
		number, err := do[int64](c, deadline, "HLEN", c.ended)
		if err != nil {
			return 0, err
		}
		has, err := do[int64](c, deadline, "HEXISTS", c.ended, id)
		if err != nil || int(number) == len(known) && (has == 1 || number == 0) {
			return 0, err
		}
	}
	fields, err := do[[]string](c, deadline, "HGETALL", c.ended)
	if err != nil {
		return 0, err
	}
	forgotten := maps.Clone(known)
	for i := 0; i+1 < len(fields); i += 2 {
		known[fields[i]] = fields[i+1]
		delete(forgotten, fields[i])
	}
	if len(forgotten) > 0 {
		args := []string{"EVAL", endScript, "3", c.total, c.ledger, c.ended, strconv.Itoa(connections)}
		for id, count := range forgotten {
			args = append(args, id, count)
		}
		_, err = do[int64](c, deadline, args...)
	}
	c.shared = err == nil
	return len(forgotten), err
}

// do sends a command and reads its reply, in one attempt; it dials where there
// is no TCP connection. An error names the address that was tried.
func do[T any](c *conn, deadline time.Time, args ...string) (reply T, err error) {
	if c.nc == nil {
		err = c.dial(deadline)
	}
	if err == nil {
		c.nc.SetDeadline(deadline)
		if reply, err = exchange[T](c, args...); args[0] == "EVALSHA" && isCode(err, "NOSCRIPT") {
			args[0], args[1] = "EVAL", script
			reply, err = exchange[T](c, args...)
		}
	}
	if err != nil {
		err = c.fail(err)
	}
	return reply, err
}

// exchange sends a command over the TCP connection and reads its reply.
func exchange[T any](c *conn, args ...string) (reply T, err error) {
	c.buf = appendCommand(c.buf[:0], args...)
	if _, err := c.nc.Write(c.buf); err != nil {
		return reply, err
	}
	reply, err = read[T](c.r)
	c.answered = c.answered || err == nil || isCode(err, "NOSCRIPT")
	return reply, err
}

// fail closes the TCP connection and returns err with the address that was tried and,
// before any reply, with a hint where TLS may be the cause. The next attempt goes
// where MOVED points.
func (c *conn) fail(err error) error {
	if c.nc != nil && !c.answered && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || isTimeout(err)) {
		hint := "the port may want TLS, rediss://"
		if c.server.tls != nil {
			hint = "the port may not have TLS, redis://"
		}
		err = fmt.Errorf("%w before any reply: %s", err, hint)
	}
	from := c.addr
	c.close()
	if isCode(err, "MOVED") {
		c.addr = movedAddr(err.Error(), from)
	}
	return fmt.Errorf("%s: %w", from, err)
}

// isTimeout reports whether err is for want of time.
func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// isCode reports whether err is an error reply with that code.
func isCode(err error, code string) bool {
	var reply redisError
	return errors.As(err, &reply) && strings.HasPrefix(string(reply), code+" ")
}

// movedAddr returns the address in "MOVED slot host:port", where an IPv6 host has
// no brackets and an empty one means the node that said it,
// https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#moved-redirection.
func movedAddr(reply, from string) string {
	addr := reply[strings.LastIndexByte(reply, ' ')+1:]
	colon := max(strings.LastIndexByte(addr, ':'), 0)
	host, port := strings.Trim(addr[:colon], "[]"), strings.TrimPrefix(addr[colon:], ":")
	if host == "" {
		host, _, _ = net.SplitHostPort(from)
	}
	return net.JoinHostPort(host, port)
}

// dial connects and shakes hands.
func (c *conn) dial(deadline time.Time) error {
	ctx, cancel := context.WithTimeout(context.Background(), min(dialTimeout, time.Until(deadline)))
	defer cancel()
	nc, err := c.server.dial(ctx, "tcp", c.addr)
	if err != nil {
		return err
	}
	nc.SetDeadline(deadline)
	if c.server.tls != nil {
		nc = tls.Client(nc, c.server.tlsConfig(c.addr))
	}
	c.nc, c.r = nc, bufio.NewReaderSize(nc, maxLine)
	for _, args := range c.server.hello {
		if _, err := exchange[string](c, args...); err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
	}
	return nil
}

// tlsConfig returns the configuration for a dial of addr. The certificate must
// name addr's host or, where MOVED pointed to a bare IP address, the server's.
func (s *redisServer) tlsConfig(addr string) *tls.Config {
	cfg := s.tls.Clone()
	host, _, _ := net.SplitHostPort(addr)
	if _, err := netip.ParseAddr(host); err != nil {
		cfg.ServerName = host
	}
	return cfg
}

// close closes the TCP connection, if there is one. The next is dialed at the
// server's address.
func (c *conn) close() {
	if c.nc != nil {
		c.nc.Close()
	}
	c.nc, c.shared, c.addr = nil, false, c.server.addr
}
