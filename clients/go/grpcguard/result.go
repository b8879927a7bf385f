package grpcguard

import (
	"bytes"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// A stored result is one of these lines followed by the reply as google.protobuf.Any or the error as google.rpc.Status.
var (
	lineReply   = []byte("dedup-grpc/1 reply\n")
	lineError   = []byte("dedup-grpc/1 error\n")
	lineNotKept = []byte("dedup-grpc/1 not-kept\n")
)

// encode returns the result to store for a reply or an error.
func encode(reply any, err error, limit int) []byte {
	line, message := lineError, proto.Message(status.Convert(err).Proto())
	if err == nil {
		answer, ok := reply.(proto.Message)
		if !ok {
			return lineNotKept
		}
		wrapped, err := anypb.New(answer)
		if err != nil {
			return lineNotKept
		}
		line, message = lineReply, wrapped
	}
	encoded, err := proto.Marshal(message)
	if err != nil || len(line)+len(encoded) > limit {
		return lineNotKept
	}
	return append(bytes.Clone(line), encoded...)
}

// decode returns the stored reply or error. ok is false if the result cannot be replayed.
func decode(result []byte) (reply any, err error, ok bool) {
	if encoded, found := bytes.CutPrefix(result, lineError); found {
		var s spb.Status
		if proto.Unmarshal(encoded, &s) != nil || s.GetCode() == 0 {
			return nil, nil, false
		}
		return nil, status.ErrorProto(&s), true
	}
	encoded, found := bytes.CutPrefix(result, lineReply)
	if !found {
		return nil, nil, false
	}
	var wrapped anypb.Any
	if proto.Unmarshal(encoded, &wrapped) != nil {
		return nil, nil, false
	}
	message, err := wrapped.UnmarshalNew()
	if err != nil {
		return nil, nil, false
	}
	return message, nil, true
}
