"""The contract between device and cloud: messages, errors, limits, and the generated protobuf code."""
