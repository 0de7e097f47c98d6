# The version is the one whose image the chart runs.
VERSION := $(shell sed -n 's/^appVersion: //p' helm/Chart.yaml)

.PHONY: help run build test check faults compare fuzz image docker-compose helm

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## /\1\t/p' Makefile | expand -t 16

run: build ## serve on port 8083
	./requestcount

build: ## the stripped, static binary
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' .

test: ## needs only Go; with REDIS_URL set, uses that Redis
	go test ./...

check: test ## the part of the gate that needs Go only: form, vet, staticcheck, tests, race detector
	test -z "$$(gofmt -l . | tee /dev/stderr)"
	go mod tidy -diff
	go vet ./...
	go run honnef.co/go/tools/cmd/staticcheck@v0.7.0 ./...
	go test -race -shuffle=on -count=1 ./...

faults: ## breaks real redis-servers and the built program under load; needs redis-server, or REDIS_SERVER=path
	cd .ci/faults && go test -count=1 -parallel 4 -v .

compare: ## the service beside its peers, as tables in Markdown; needs wrk and redis-server
	cd .ci/bench && go run . $(ARGS)

fuzz: ## a minute of nonsense for the reply reader
	go test -run '^$$' -fuzz FuzzReadReply -fuzztime 1m .

image: ## requestcount:VERSION and requestcount:latest
	docker build --network none --build-arg VERSION=$(VERSION) -t requestcount:$(VERSION) -t requestcount:latest .

docker-compose: ## three replicas behind port 8083, in the foreground
	docker compose up --build || [ $$? = 130 ] # Ctrl-C, the way to end it

helm: image ## three replicas in the cluster of kubectl, at localhost:8083 with Docker Desktop and k3d
	@# Each build has the same tag; the annotation, the image's id, has a new one rolled out.
	helm upgrade --install requestcount ./helm --reset-then-reuse-values --set service.type=LoadBalancer \
		--set-string podAnnotations.image=$$(docker image inspect -f '{{.Id}}' requestcount:$(VERSION))
	kubectl rollout status deployment/requestcount --timeout 2m
