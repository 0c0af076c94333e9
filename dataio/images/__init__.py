"""Single images: decoding, and the codec policy that all images go through.

Public names:
    `codec.CodecPolicy`, `codec.preset_policy`: how every source becomes the bytes in a shard.
    `codec.encode`: apply a policy to one source.
    `opening.open_image`, `opening.upright`, `opening.to_rgb`: from bytes to the picture as viewers show it.
    `stored.stored_lossless`, `stored.jpeg_quality`: how a file stores its picture, by content.
    `training_decoder.training_fault`: whether training sees the picture that Pillow shows.
    `metadata.image_orientation`: how a picture is to be turned, from damaged metadata too.
    `jpeg_scans.check_jpeg`: whether a JPEG's data deliver the whole picture.
    `headers.header_fault`: check an image's header before DALI reads it.
"""
