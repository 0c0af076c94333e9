"""Where bytes come from: folders, zip files in one part or several, globs and streams.

Public names:
    `source.Source`: a folder or zip file, read by relative path.
    `inputs`: the images that a command line names.
    `split_zip.open_zip`: zip files in several parts.
    `provenance`: what an image file says about its origin.
"""
