"""Files of 4D-STEM frames: ``open_dataset`` finds the frames and the calibration, ``Dataset4D`` reads them.

layouts            open_dataset: what kind of file it is
dataset            Dataset4D: what every file of frames is, decoded block by block or packed as it lies in the file
hdf5, one_dataset  opening HDF5, errors as sentences; frames that are one dataset
own, emd           calibration of liveptycho's own layout; of EMD / py4DSTEM files
dectris            master and data files of DECTRIS' FileWriter; side_files: what other programs say of the scan
chunks             compressed HDF5 chunks as payloads of a stream
mib, npy           Merlin's files; NumPy's
foreign            whatever else RosettaSciIO reads
units              lengths and angles as files spell them
"""

from stream.files.dataset import Dataset4D
from stream.files.layouts import open_dataset

__all__ = ["Dataset4D", "open_dataset"]
