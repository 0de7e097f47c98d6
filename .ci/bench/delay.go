package main

import (
	"net"
	"syscall"
	"time"
)

// serveDelay passes bytes between addr and target, each one d late, as a
// network between a service and its Redis does.
func serveDelay(addr, target string, d time.Duration) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		client, err := l.Accept()
		if err != nil {
			return err
		}
		server, err := net.Dial("tcp", target)
		if err != nil {
			client.Close()
			continue
		}
		go pass(server, client, d)
		go pass(client, server, d)
	}
}

type piece struct {
	bytes []byte
	due   time.Time
}

func pass(to, from net.Conn, d time.Duration) {
	pieces := make(chan piece, 1024)
	go func() {
		defer to.Close()
		for p := range pieces {
			sleepUntil(p.due)
			if _, err := to.Write(p.bytes); err != nil {
				from.Close() // which ends the loop below, and so this one
			}
		}
	}()
	defer close(pieces)
	for {
		b := make([]byte, 16<<10)
		n, err := from.Read(b)
		if err != nil {
			return
		}
		pieces <- piece{b[:n], time.Now().Add(d)}
	}
}

// sleepUntil is finer than time.Sleep, which rounds up to a millisecond in an idle process.
func sleepUntil(t time.Time) {
	if d := time.Until(t); d > 0 {
		ts := syscall.NsecToTimespec(d.Nanoseconds())
		syscall.Nanosleep(&ts, nil)
	}
}
