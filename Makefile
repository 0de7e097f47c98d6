# The version is the newest tag, or the commit.
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

.PHONY: run build test fuzz image docker-compose

run: ## serve on port 8083
	go run .

build: ## the stripped, static binary
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' .

test: ## needs only Go; with REDIS_URL set, uses that Redis
	go test ./...

fuzz: ## a minute of nonsense for the reply reader
	go test -run '^$$' -fuzz FuzzReadInt -fuzztime 1m .

image: ## requestcount:VERSION and requestcount:latest
	docker build --build-arg VERSION=$(VERSION) -t requestcount:$(VERSION) -t requestcount:latest .

docker-compose: ## three replicas behind port 8083, in the foreground
	docker compose up --build
