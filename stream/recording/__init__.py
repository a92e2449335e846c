"""Recordings of streams: one HDF5 file a series, compressed frames as they came, readable with h5py and hdf5plugin.

layout           what is in the file, and why
payload_check    which payloads a reader will be able to unpack
recorder         Recorder: writing, while the stream is reconstructed
reader           open_recording, Recording: the frames again, as they came
"""

from stream.recording.reader import Recording, is_recording, open_recording
from stream.recording.recorder import Recorder

__all__ = ["Recorder", "Recording", "is_recording", "open_recording"]
