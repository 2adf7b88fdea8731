"""What those see who watch a device: events as they happen, and a look at camera and microphone."""
