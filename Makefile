# The version is the one whose image the chart runs.
VERSION := $(shell sed -n 's/^appVersion: //p' helm/Chart.yaml)

# Without it the same source has another image id each time, and is rolled out for nothing.
export BUILDX_NO_DEFAULT_ATTESTATIONS := 1

.PHONY: help run build test check faults compare fuzz image docker-compose helm

help: ## list the targets
	@awk -F ':.* ## ' '/^[a-z-]+:.* ## / { printf "%-16s%s\n", $$1, $$2 }' Makefile

run: build ## serve on port 8083
	./requestcount

build: ## the stripped, static binary
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' .

test: ## needs only Go; with REDIS_URL set, uses that Redis
	go test ./...

check: ## form, vet, staticcheck, and the tests with the race detector: 2 minutes; needs a C compiler
	test -z "$$(gofmt -l . | tee /dev/stderr)"
	go mod tidy -diff
	go vet ./...
	go run honnef.co/go/tools/cmd/staticcheck@v0.7.0 ./...
	go test -race -shuffle=on -count=1 ./...

faults: ## breaks real redis-servers under load: 2 minutes; needs redis-server, or REDIS_SERVER=path
	cd .ci/faults && go test -count=1 -parallel 4 -v .

compare: ## the service beside its peers: 6 minutes; needs wrk, redis-server; ARGS=-scale: many instances
	cd .ci/bench && go run . $(ARGS)

fuzz: ## a minute of nonsense for the reply reader
	go test -run '^$$' -fuzz FuzzReadReply -fuzztime 1m .

image: ## requestcount:VERSION and requestcount:latest
	docker build --network none --build-arg VERSION=$(VERSION) \
		-t requestcount:$(VERSION) -t requestcount:latest .

docker-compose: ## three replicas behind port 8083, in the foreground
	docker compose up --build || [ $$? = 130 ] # Ctrl-C, the way to end it

helm: ## three replicas in a local cluster, that of kubectl's context
	@# The image's id is its tag, as a cluster does not replace a tag that is in use.
	@context=$$(kubectl config current-context) && case $$context in \
	docker-desktop | orbstack | rancher-desktop | colima | colima-*) load=: ;; \
	kind-*) load='kind load docker-image --name $${context#kind-} $$image' ;; \
	k3d-*) load='k3d image import --cluster $${context#k3d-} $$image' ;; \
	microk8s) load='docker save $$image | microk8s ctr image import -' ;; \
	*) kubectl config view --minify | grep -q 'provider: minikube' || { \
		echo "make helm does not know how to bring an image into the cluster of $$context." \
		"Bring it there, and install the chart, as helm/README.md says." >&2; exit 1; }; \
		load='minikube --profile $$context image load $$image' ;; \
	esac && $(MAKE) image && \
	tag=$$(docker image inspect -f '{{.Id}}' requestcount:$(VERSION) | cut -c 8-19) && \
	image=requestcount:$$tag && docker tag requestcount:$(VERSION) $$image && eval "$$load" && \
	helm upgrade --install requestcount ./helm --reset-then-reuse-values $(ARGS) \
		--set-string image.tag=$$tag
	kubectl rollout status deployment/requestcount --timeout 2m
