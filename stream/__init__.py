"""liveptycho's streaming side: frames in, phase image out."""
