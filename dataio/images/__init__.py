"""Single images: decoding, and the codec policy that all images go through.

Public names:
    `codec.CodecPolicy`, `codec.preset_policy`: how every source becomes the bytes in a shard.
    `codec.encode`: apply a policy to one source.
    `codec.open_image`, `codec.to_rgb`: decode an image completely.
    `headers.header_fault`: check an image's header before DALI reads it.
"""
