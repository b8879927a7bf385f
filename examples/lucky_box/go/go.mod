module github.com/dedup-service/dedup-service/examples/lucky_box/go

go 1.26.0

require (
	github.com/dedup-service/dedup-service/clients/go v0.0.0
	github.com/redis/go-redis/v9 v9.23.0
	google.golang.org/grpc v1.80.0
)

require (
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	go.uber.org/atomic v1.12.0 // indirect
	golang.org/x/net v0.49.0 // indirect
	golang.org/x/sys v0.48.0 // indirect
	golang.org/x/text v0.33.0 // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260120221211-b8f7ae30c516 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
)

replace github.com/dedup-service/dedup-service/clients/go => ../../../clients/go
