// Load sends a steady load of GETs until SIGTERM, or for five minutes at the
// most, and reports "ANSWERS UNAVAILABLE FAILED INSTANCES WRONG LONGEST": how many
// requests were answered with the cluster's number, how many with 503 and without
// it, how many not as promised, how many instances were seen, how many numbers of
// the cluster were told twice or after a higher one, and the longest wait in ms.
//
//	go run . URL
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"load/answer"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var mu sync.Mutex
	answers, unavailable, failed, wrong, seen := 0, 0, 0, 0, map[string]bool{}
	told, highest, longest := map[int64]bool{}, int64(0), time.Duration(0)
	var wg sync.WaitGroup
	for i := range 8 {
		// Half of the clients keep their connections, half come anew each time.
		client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: i%2 == 0}}
		wg.Go(func() {
			for ctx.Err() == nil {
				mu.Lock()
				before := highest
				mu.Unlock()
				began := time.Now()
				a, err := answer.Get(client, os.Args[1])
				mu.Lock()
				longest = max(longest, time.Since(began))
				switch {
				case err != nil:
					failed++
					fmt.Fprintln(os.Stderr, time.Now().Format("15:04:05.000"), err)
				case a.Status == http.StatusOK:
					answers++
					if a.Total <= before || told[a.Total] {
						wrong++
						fmt.Fprintln(os.Stderr, time.Now().Format("15:04:05.000"), a, "after", before)
					}
					told[a.Total] = true
					highest = max(highest, a.Total)
				default:
					unavailable++
				}
				seen[a.Instance] = true
				mu.Unlock()
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	delete(seen, "") // of failed requests
	fmt.Println(answers, unavailable, failed, len(seen), wrong, longest.Milliseconds())
}
