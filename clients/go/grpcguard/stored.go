package grpcguard

import (
	"bytes"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
)

// A stored reply is one of these lines; the first one is followed by the reply as google.protobuf.Any.
var (
	lineReply   = []byte("dedup-grpc/1 reply\n")
	lineNotKept = []byte("dedup-grpc/1 not-kept\n")
)

// The older form is this byte followed by the bytes of the reply.
const bareReply = 1

// encode returns what to store of a reply. An error has none.
func encode(reply any, err error, limit int) []byte {
	message, ok := reply.(proto.Message)
	if err != nil || !ok {
		return lineNotKept
	}
	options := proto.MarshalOptions{Deterministic: true}
	wrapped := &anypb.Any{}
	if anypb.MarshalFrom(wrapped, message, options) != nil {
		return lineNotKept
	}
	encoded, err := options.Marshal(wrapped)
	if err != nil || len(lineReply)+len(encoded) > limit {
		return lineNotKept
	}
	return append(bytes.Clone(lineReply), encoded...)
}

// replyType returns the type of a method's replies, or nil if the program does not contain it.
func replyType(fullMethod string) protoreflect.MessageType {
	name := strings.Replace(strings.TrimPrefix(fullMethod, "/"), "/", ".", 1)
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(name))
	method, ok := found.(protoreflect.MethodDescriptor)
	if err != nil || !ok {
		return nil
	}
	message, err := protoregistry.GlobalTypes.FindMessageByName(method.Output().FullName())
	if err != nil {
		return nil
	}
	return message
}

// decode returns the stored reply, or nil if the result cannot be replayed as that type. A nil type is any type.
func decode(result []byte, replies protoreflect.MessageType) proto.Message {
	if encoded, found := bytes.CutPrefix(result, lineReply); found {
		var wrapped anypb.Any
		if proto.Unmarshal(encoded, &wrapped) != nil {
			return nil
		}
		if replies != nil && wrapped.MessageName() != replies.Descriptor().FullName() {
			return nil
		}
		if reply, err := wrapped.UnmarshalNew(); err == nil {
			return reply
		}
		return nil
	}
	if len(result) > 0 && result[0] == bareReply && replies != nil {
		reply := replies.New().Interface()
		if proto.Unmarshal(result[1:], reply) == nil {
			return reply
		}
	}
	return nil
}
