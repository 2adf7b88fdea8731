"""Where clips come from: files of a data set, or camera and microphone."""
