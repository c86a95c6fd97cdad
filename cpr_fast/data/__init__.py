"""From videos on disk to clips: storage, decoding, indexes, optical flow, clips, stored features, synthetic videos.

Its packages import `config`, `runtime`, `ops` and, from the bottom up, each other (`video`, `storage`, `index`,
`flow`, `clips`, `features`; `synthetic`), never networks or training.
"""
