FROM docker.io/library/golang:1.26-alpine AS build
WORKDIR /src
COPY go.mod *.go ./
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o /requestcount .

FROM scratch
ARG VERSION=dev
LABEL org.opencontainers.image.title="requestcount" \
      org.opencontainers.image.description="Counts the requests to this instance and to the cluster, exactly" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /requestcount /requestcount
USER 65532:65532
EXPOSE 8083
# Rare, as each is a process: Compose and Kubernetes check in their own way.
HEALTHCHECK --interval=10s --timeout=3s --retries=3 CMD ["/requestcount", "healthcheck"]
ENTRYPOINT ["/requestcount"]
