package main

import (
	"context"
	"fmt"
	"net/http"
	"sync/atomic"

	redigo "github.com/gomodule/redigo/redis"
	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
)

// peers are the services that the project is measured beside: net/http with a
// counter in memory, which no service with a Redis can pass, and one INCR for
// each request by each of the well-known clients.
var peers = []string{"bare", "go-redis", "redigo", "rueidis"}

const peerKey = "bench:peer"

// servePeer serves the project's answer at addr until the process is ended.
func servePeer(kind, addr, redis string) error {
	incr, err := newIncr(kind, redis)
	if err != nil {
		return err
	}
	var n atomic.Int64
	http.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		total, err := incr(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "You are talking to instance %s.\nThis is request %d to this instance and request %d to the cluster.\n", addr, n.Add(1), total)
	})
	return http.ListenAndServe(addr, nil)
}

func newIncr(kind, redis string) (func(context.Context) (int64, error), error) {
	switch kind {
	case "bare":
		var n atomic.Int64
		return func(context.Context) (int64, error) { return n.Add(1), nil }, nil
	case "go-redis":
		c := goredis.NewClient(&goredis.Options{Addr: redis})
		return func(ctx context.Context) (int64, error) { return c.Incr(ctx, peerKey).Result() }, nil
	case "redigo":
		pool := &redigo.Pool{MaxIdle: 16, MaxActive: 16, Wait: true, Dial: func() (redigo.Conn, error) { return redigo.Dial("tcp", redis) }}
		return func(context.Context) (int64, error) {
			c := pool.Get()
			defer c.Close()
			return redigo.Int64(c.Do("INCR", peerKey))
		}, nil
	case "rueidis":
		c, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{redis}, DisableCache: true})
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context) (int64, error) {
			return c.Do(ctx, c.B().Incr().Key(peerKey).Build()).AsInt64()
		}, nil
	}
	return nil, fmt.Errorf("unknown peer %q: want one of %q", kind, peers)
}
