package main

import (
	"bufio"
	"cmp"
	"context"
	"crypto/rand"
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
	maxString  = 1 << 20                // longest string accepted; one of an entry is below 1 KiB
	minSilence = 250 * time.Millisecond // until a connection is taken for dead, at first
	maxSilence = 500 * time.Millisecond // where Redis is slow, and to connect
	minPause   = 10 * time.Millisecond  // first between two attempts; it doubles with each
	maxPause   = 100 * time.Millisecond // longest
	chunk      = 1000                   // entries in a command, so that Redis is not held up for long
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
	lookup  func(ctx context.Context, host string) (addrs []string, err error)
	dial    func(ctx context.Context, network, addr string) (net.Conn, error)

	generation atomic.Int64 // grows when a kept connection fails; older ones are dialed anew
}

// lookupAlone looks a host up with a resolver of its own. A shared one merges lookups, and one lost
// packet then holds up all connections: for 5 s, unless resolv.conf says otherwise.
func lookupAlone(ctx context.Context, host string) ([]string, error) {
	return new(net.Resolver).LookupHost(ctx, host)
}

// connect dials the addresses of addr's host in turn. Each has an equal part of the time that is
// left: a net.Dialer would spend all of it on the first one, which may be silent.
func (s *redisServer) connect(ctx context.Context, addr string) (nc net.Conn, err error) {
	host, port, _ := net.SplitHostPort(addr)
	ips, err := s.lookup(ctx, host)
	deadline, _ := ctx.Deadline()
	for i, ip := range ips {
		part := time.Until(deadline) / time.Duration(len(ips)-i)
		partCtx, cancel := context.WithTimeout(ctx, part)
		nc, err = s.dial(partCtx, "tcp", net.JoinHostPort(ip, port))
		cancel()
		if err == nil {
			break
		}
	}
	return nc, err
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
	s := &redisServer{addr: net.JoinHostPort(u.Hostname(), port), timeout: timeout,
		lookup: lookupAlone, dial: new(net.Dialer).DialContext}
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

// errLost is what the script answers where the sender must follow into another epoch. It is also
// the error of a look until the instance has entered that.
const errLost = redisError("LOST the ledger is of another epoch")

// script raises entries of the ledger, each to a count, and the total by the differences. It
// answers the total that an entry reached by that. Sent again it changes nothing and answers the
// same, as the entry keeps what it reached. Those who look or restore are answered the total. Its
// arguments are:
//   - the epoch in which the sender counts, empty for none;
//   - the total that the sender knows;
//   - a random name, for the next epoch;
//   - for each entry its id, its count, and the total that it reached, which is empty where
//     requests are counted, not restored.
//
// The next epoch begins where the ledger has none. It also begins where a sender of the present one
// knows a higher total: Redis has gone back to an older copy. A sender of another epoch is answered
// errLost.
//
// HSETNX makes a look fail where Redis refuses writes, as a replica does. It changes nothing where
// there is a total. Numbers are written with %d, as Lua has 1e+14. They are exact to 2^53.
const script = `local epoch, known, nextEpoch = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local fields = {'epoch', 'total'}
for i = 4, #ARGV, 3 do
	table.insert(fields, ARGV[i])
end
local values = redis.call('HMGET', KEYS[1], unpack(fields))
local now, total = values[1], tonumber(values[2] or 0)
if values[2] and not string.match(values[2], '^-?%d+$') or math.abs(total) >= 2^53 then
	return redis.error_reply('ERR the total is no whole number below 2^53: ' .. values[2])
end
if not now or now == '' or now == epoch and total < known then
	redis.call('HSET', KEYS[1], 'epoch', nextEpoch)
	now = nextEpoch
end
if now ~= epoch then
	return redis.error_reply('` + string(errLost) + `')
end
local answer, changes = nil, {}
for i = 4, #ARGV, 3 do
	local id, count, restored = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2] ~= ''
	local value = values[(i + 5) / 3] or '0 0' -- values[3] is that of the first entry
	local oldCount, reached = string.match(value, '^(%d+) (-?%d+)$')
	if not oldCount then
		return redis.error_reply('ERR the ledger has no count at ' .. id .. ': ' .. value)
	end
	if tonumber(oldCount) < count then
		total = total + (count - oldCount)
		reached = restored and ARGV[i + 2] or total
		table.insert(changes, id)
		table.insert(changes, string.format('%d %d', count, reached))
	end
	if not restored then
		answer = tonumber(reached)
	end
end
if #changes > 0 then
	redis.call('HSET', KEYS[1], 'total', string.format('%d', total), unpack(changes))
end
if not answer then
	redis.call('HSETNX', KEYS[1], 'total', 0)
end
return answer or total`

// scriptSHA names the script to EVALSHA, https://redis.io/docs/latest/commands/evalsha/.
var scriptSHA = fmt.Sprintf("%x", sha1.Sum([]byte(script)))

// An entry of the ledger is how far a connection has counted.
type entry struct {
	count   int64 // requests
	reached int64 // the total when it reached that count; 0 after a 503, as nobody asks for it
}

// A ledger is what Redis holds, a hash. Nothing is ever removed from it.
type ledger struct {
	epoch   string           // a random name; it lasts until Redis loses data
	open    string           // the last epoch that an instance has entered
	total   int64            // the sum of all counts, and what somebody has set by hand
	entries map[string]entry // by id: one for each connection that has ever counted
}

// A conn is a connection to Redis, for one goroutine at a time. It outlives its TCP
// connections: one is dialed when first needed and again after each failure.
type conn struct {
	server *redisServer
	key    string // of the ledger
	id     string // of its entry there

	addr       string   // to dial, or dialed
	nc         net.Conn // nil while there is none
	r          *bufio.Reader
	generation int64         // of the server when nc was dialed
	took       time.Duration // until the last reply began, or the dial ended
	began      time.Time     // when the command under way was tried first
	deadline   time.Time     // when its present attempt must have ended
}

// raise raises the connection's entry to a count and returns the total that this reached. Where the
// ledger is of another epoch it does nothing and returns errLost. After another error nobody
// knows whether Redis did it.
func (c *conn) raise(epoch string, known, count int64) (total int64, err error) {
	return c.eval(epoch, known, c.id, itoa(count), "")
}

// restore gives Redis the counts that it lacks, and returns the total. It fails wherever counting
// would, with errLost as raise does, even if there are no entries.
func (c *conn) restore(epoch string, known int64, entries map[string]entry) (int64, error) {
	var args []string
	for id, e := range entries {
		args = append(args, id, itoa(e.count), itoa(e.reached))
	}
	for {
		n := min(len(args), 3*chunk)
		total, err := c.eval(epoch, known, args[:n]...)
		if args = args[n:]; err != nil || len(args) == 0 {
			return total, err
		}
	}
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// eval has Redis run the script.
func (c *conn) eval(epoch string, known int64, entries ...string) (int64, error) {
	args := []string{"EVALSHA", scriptSHA, "1", c.key, epoch, itoa(known), rand.Text()}
	got, err := c.try(':', append(args, entries...)...)
	return got.n, err
}

// markOpen marks an epoch as one that an instance has entered.
func (c *conn) markOpen(epoch string) error {
	_, err := c.try(':', "HSET", c.key, "open", epoch)
	return err
}

// read returns the ledger. Fields that hold no entry are passed over.
func (c *conn) read() (ledger, error) {
	got, err := c.try('*', "HGETALL", c.key)
	l := ledger{entries: make(map[string]entry, len(got.list)/2)}
	for pair := range slices.Chunk(got.list, 2) {
		switch id, value := pair[0], pair[len(pair)-1]; id {
		case "epoch":
			l.epoch = value
		case "open":
			l.open = value
		case "total":
			l.total, _ = strconv.ParseInt(value, 10, 64)
		default:
			count, reached, _ := strings.Cut(value, " ")
			n, err1 := strconv.ParseInt(count, 10, 64)
			total, err2 := strconv.ParseInt(reached, 10, 64)
			if err1 == nil && err2 == nil {
				l.entries[id] = entry{n, total}
			}
		}
	}
	return l, err
}

// try sends a command until it succeeds, over the TCP connection that was kept, if there is one,
// and then over fresh ones. When the server's timeout is over it tries one last time. An error
// names the address that was tried.
func (c *conn) try(kind byte, args ...string) (got reply, err error) {
	c.began = time.Now()
	if c.generation != c.server.generation.Load() {
		c.close()
	}
	if c.nc != nil {
		got, err = c.attempt(kind, args...)
		if err == nil || errors.Is(err, errLost) {
			return got, err
		}
		if !errors.As(err, new(redisError)) { // the others that were kept may be dead, too
			c.server.generation.CompareAndSwap(c.generation, c.generation+1)
		}
	}
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		last := time.Since(c.began) >= c.server.timeout
		got, err = c.attempt(kind, args...)
		if err == nil || errors.Is(err, errLost) {
			return got, err
		}
		if last {
			return got, fmt.Errorf("%s: %w", c.addr, err)
		}
		time.Sleep(pause)
	}
}

// attempt sends a command once, and follows MOVED, for half of the server's timeout at most. After
// an error other than errLost it closes the connection: the next one may lead to another server.
func (c *conn) attempt(kind byte, args ...string) (got reply, err error) {
	c.deadline = time.Now().Add(c.server.timeout / 2)
	if c.nc == nil {
		c.addr = c.server.addr
	}
	got, err = c.roundTrip(kind, args...)
	if isCode(err, "MOVED") {
		c.close()
		c.addr = movedAddr(err.Error(), c.addr)
		got, err = c.roundTrip(kind, args...)
	}
	if isCode(err, "NOSCRIPT") {
		args = append([]string{"EVAL", script}, args[2:]...)
		got, err = c.roundTrip(kind, args...)
	}
	if err != nil && !errors.Is(err, errLost) {
		c.close()
	}
	return got, err
}

// roundTrip sends a command and reads its reply. Where there is no TCP connection it dials one.
//
// A connection may be dead without a sign, a fresh one, too. Until its reply begins it has the
// longest of these:
//   - minSilence;
//   - twice what it last took: Redis may be far away;
//   - half of the time for which the command has been tried, up to maxSilence: Redis may be slow.
func (c *conn) roundTrip(kind byte, args ...string) (reply, error) {
	began := time.Now()
	if c.nc == nil {
		if err := c.dial(); err != nil {
			return reply{}, err
		}
	}
	silence := max(minSilence, 2*c.took, min(began.Sub(c.began)/2, maxSilence))
	c.nc.SetDeadline(time.Now().Add(min(silence, time.Until(c.deadline))))
	if _, err := c.nc.Write(encode(args...)); err != nil {
		return reply{}, err
	}
	if _, err := c.r.Peek(1); err != nil {
		return reply{}, err
	}
	c.took = time.Since(began)
	c.nc.SetDeadline(c.deadline)
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

// dial connects to the address and sends the server's greeting.
func (c *conn) dial() error {
	began := time.Now()
	c.generation = c.server.generation.Load()
	ctx, cancel := context.WithTimeout(context.Background(), min(maxSilence, time.Until(c.deadline)))
	defer cancel()
	nc, err := c.server.connect(ctx, c.addr)
	if err != nil {
		return err
	}
	if c.server.tls != nil {
		// The certificate must be for this host, or for REDIS_URL's where MOVED named a bare IP.
		cfg := c.server.tls.Clone()
		if host, _, _ := net.SplitHostPort(c.addr); net.ParseIP(host) == nil {
			cfg.ServerName = host
		}
		nc = tls.Client(nc, cfg)
	}
	c.nc, c.r, c.took = nc, bufio.NewReader(nc), time.Since(began)
	for _, args := range c.server.greet {
		if _, err := c.roundTrip('+', args...); err != nil {
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
