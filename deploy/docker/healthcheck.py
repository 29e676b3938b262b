"Exit 0 if the service in this container answers 200. Arguments: path, and port (8000 by default)."
import http.client
import sys

# Not urllib: it would use the proxy of the environment for the container's own address.
service = http.client.HTTPConnection("127.0.0.1", int((*sys.argv, 8000)[2]), timeout=3)
try:
    service.request("GET", sys.argv[1])
    sys.exit(service.getresponse().status != 200)
except (OSError, http.client.HTTPException) as e: sys.exit(f"{sys.argv[1]}: {e}")
