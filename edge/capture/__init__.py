"""The sources of clips: files of a data set, or camera and microphone."""
