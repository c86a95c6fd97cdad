"""From videos on disk to clips: storage, decoding, indexes, optical flow, clip loading, synthetic videos.

Its packages import `config`, `runtime`, `ops` and, from the bottom up, each other (`video`, `storage`, `index`,
`flow`, `clips`; `synthetic`), never networks or training.
"""
