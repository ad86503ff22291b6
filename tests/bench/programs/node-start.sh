echo 'console.log(require("path").join("a", "b"))' >t.js
begin
for i in 1 2 3 4 5; do node t.js; done
finish 5
