"""Questions and answers about videos: the code that chat, web page, server and benchmarks share."""
