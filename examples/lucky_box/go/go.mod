module github.com/dedup-service/dedup-service/examples/lucky_box/go

go 1.24

require github.com/dedup-service/dedup-service/clients/go v0.0.0

replace github.com/dedup-service/dedup-service/clients/go => ../../../clients/go
