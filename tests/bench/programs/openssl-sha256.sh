# By time, so what counts is how often: "Doing sha256 for 1s on 16384 size blocks: 81234 sha256's in 1.00s".
echo hello | openssl dgst -sha256
begin
openssl speed -seconds 1 -bytes 16384 -evp sha256 2>out >/dev/null
finish "$(sed -n 's/.* size blocks: \([0-9]*\) .*/\1/p' out)"
