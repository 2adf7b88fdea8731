"""INFaaS in real time: models of several sizes per task, loaded and dropped within a memory budget."""
