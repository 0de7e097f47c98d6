package main

import (
	"context"
	"fmt"
	"net/http"
	"sync/atomic"

	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
)

const peerKey = "bench:peer"

// servePeer serves the project's answer at addr until the process is ended. The
// bare peer counts in memory, so no service with a Redis can pass it. The others
// send one INCR for each request, by well-known clients.
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
		fmt.Fprintf(w, "You are talking to instance %s.\n"+
			"This is request %d to this instance and request %d to the cluster.\n",
			addr, n.Add(1), total)
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
		return func(ctx context.Context) (int64, error) {
			return c.Incr(ctx, peerKey).Result()
		}, nil
	case "rueidis":
		options := rueidis.ClientOption{InitAddress: []string{redis}, DisableCache: true}
		c, err := rueidis.NewClient(options)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context) (int64, error) {
			return c.Do(ctx, c.B().Incr().Key(peerKey).Build()).AsInt64()
		}, nil
	}
	return nil, fmt.Errorf("unknown peer %q: want bare, go-redis or rueidis", kind)
}
