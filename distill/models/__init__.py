"""The networks: trunks, the teacher, classifier heads and compressors."""
