"""Make students: the base student, personal students, their measurement, and their export to ONNX."""
