"""Where bytes come from: folders, zip files in one part or several, globs, streams and URLs.

Public names:
    `source.Source`: a folder or zip file, read by relative path.
    `inputs`: the images that a command line names.
    `split_zip.open_zip`: zip files in several parts.
    `remote_path.RemotePath`, `remote_path.place_of`: files behind a URL, read with retries.
    `provenance`: what an image file says about its origin.
"""
