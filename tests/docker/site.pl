# The sample site of the test variant.
use strict;
use warnings;
use IO::Socket::INET;

$SIG{TERM} = sub { exit };
$SIG{PIPE} = 'IGNORE'; # a client that does not wait for its answer
my $server = IO::Socket::INET->new(LocalPort => 8080, Listen => 50, ReuseAddr => 1) or die $!;
while (my $client = $server->accept) {
    my $line = <$client> // '';
    while (my $header = <$client>) { last if $header eq "\r\n" }
    my $status = $line =~ m{ /missing } ? '404 Not Found' : '200 OK';
    print $client "HTTP/1.1 $status\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n";
    close $client;
}
