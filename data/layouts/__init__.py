"""The published layouts of data sets: CREMA-D, AVE, and which of them a folder has."""
