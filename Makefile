# The version is the one whose image the chart runs.
VERSION := $(shell sed -n 's/^appVersion: //p' helm/Chart.yaml)

.PHONY: run build test faults bench fuzz image docker-compose helm

run: ## serve on port 8083
	go run .

build: ## the stripped, static binary
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' .

test: ## needs only Go; with REDIS_URL set, uses that Redis
	go test ./...

faults: build ## breaks real redis-servers and the built binary under load; needs redis-server and redis-cli
	PROGRAM=$(CURDIR)/requestcount go test -count=1 -v -run 'TestRealServers|TestRefusedByRedis|TestManyBadClients' .

bench: ## the handler and the flight over real sockets; needs redis-server
	go test -run '^$$' -bench . -benchmem .

fuzz: ## a minute of nonsense for the reply reader
	go test -run '^$$' -fuzz FuzzReadInt -fuzztime 1m .

image: ## requestcount:VERSION and requestcount:latest
	docker build --network none --build-arg VERSION=$(VERSION) -t requestcount:$(VERSION) -t requestcount:latest .

docker-compose: ## three replicas behind port 8083, in the foreground
	docker compose up --build || [ $$? = 130 ] # Ctrl-C, the way to end it

helm: image ## three replicas in the cluster of kubectl, at localhost:8083 with Docker Desktop and k3d
	@# Each build has the same tag; the annotation, the image's id, has a new one rolled out.
	helm upgrade --install requestcount ./helm --reset-then-reuse-values --set service.type=LoadBalancer \
		--set-string podAnnotations.image=$$(docker image inspect -f '{{.Id}}' requestcount:$(VERSION))
	kubectl rollout status deployment/requestcount --timeout 2m
