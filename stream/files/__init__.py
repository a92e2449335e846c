"""4D-STEM data in HDF5 files: ``open_dataset`` finds the frames and the calibration, ``Dataset4D`` reads them.

hdf5       opening, errors as sentences, checked numbers
layouts    open_dataset: which dataset, which layout; liveptycho's own layout
emd        EMD / py4DSTEM files
dataset    Dataset4D: frames in raster order, block by block
"""

from stream.files.dataset import Dataset4D
from stream.files.layouts import open_dataset

__all__ = ["Dataset4D", "open_dataset"]
